"""Measures, once for each model, how its logits follow from its hidden states. Refuses what the losses cannot take.

Names in a configuration do not say enough: two models read the same name, and one multiplies by it where the other
divides. So the model itself is asked. A forward hook on the backbone puts random states in place of its own, and the
model's logits for them are compared with those of `HeadSpec`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .head_spec import HeadError, HeadSpec
from .wrappers import eval_mode

SIZES = (1.0, 10.0, 100.0)  # of the random states, in norms of the model's own: large ones show a softcap
ROWS = 2  # random states of each size
TOLERANCE = 1e-4  # relative, in fp32
ULPS = 2  # of a half precision, by which a norm may differ instead

# (the facts that the result depends on, softcap, scale) by model
_MEASURED: WeakKeyDictionary[nn.Module, tuple[tuple, float | None, float]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Measurement:
    """Random hidden states `[rows, H]`, the model's logits for them `[rows, V]`, and how exact these are."""

    states: Tensor
    logits: Tensor
    tolerance: float


def with_measured_transform(
    head: HeadSpec, base: nn.Module, backbone: nn.Module, run: Callable[[Callable[[], Any]], Any]
) -> HeadSpec:
    """Returns `head` with the softcap and scale by which `base` turns hidden states into logits.

    The model runs once, with six tokens, the first time that it is seen. Its configuration's softcaps and scales are
    tried, then a scale that is fitted. The global random state and the modules' modes stay as they are.

    Args:
        head: its weight and bias, gathered.
        run: calls a function inside the wrapper that gathers sharded weights; all ranks must call it then.

    Raises:
        HeadError: no softcap and scale give the model's logits, or its weights are not finite.
    """
    facts = _facts(base, backbone)
    known = _MEASURED.get(base)
    if known is None or known[0] != facts:
        found = _fit(head, base, _measure(head, base, backbone, run))
        known = _MEASURED[base] = (facts, found.softcap, found.scale)
    return replace(head, softcap=known[1], scale=known[2])


def _facts(base: Any, backbone: nn.Module) -> tuple:
    """Returns what changes a model's logits but not its identity: settings, hooks, a replaced head or forward."""
    head = base.get_output_embeddings()
    hooks = tuple(id(hook) for module in (base, backbone, head) for hook in module._forward_hooks.values())
    return (tuple(_settings(base)), hooks, id(head), id(vars(base).get("forward")))


def _settings(base: Any) -> Iterator[tuple[str, float]]:
    """The numbers of the configuration whose names speak of the logits' cap or scale."""
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    for name, value in {**vars(base.config), **vars(text)}.items():
        of_logits = any(part in name for part in ("logit", "head", "output")) and "att" not in name
        speaks = "softcap" in name or (of_logits and any(part in name for part in ("cap", "scal", "mult")))
        if speaks and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield name, float(value)


class _RandomStates:
    """A forward hook that puts random hidden states in place of a module's own, and keeps both.

    Attributes:
        own: the first output that it replaced, `[rows, H]`; None before.
        states: what it put there, `[rows, H]`.
        dtypes: those in which the model computes its logits.
    """

    def __init__(self, base: nn.Module, head: HeadSpec):
        directions = torch.randn(len(SIZES) * ROWS, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
        sizes = torch.tensor(SIZES).repeat_interleave(ROWS)
        self.unit_states = directions / directions.norm(dim=-1, keepdim=True) * sizes[:, None]
        self.base, self.dtypes = base, {head.weight.dtype}
        self.own: Tensor | None = None
        self.states: Tensor | None = None
        self.modules: set[nn.Module] = set()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if own.shape[-1] != self.unit_states.shape[1]:
            raise HeadError(
                f"the hidden states of {type(self.base).__name__} have size {own.shape[-1]}, and its head takes "
                f"{self.unit_states.shape[1]}: there is a layer between them. Compute the loss from its logits."
            )
        if self.own is None:
            self.own = own[0]
            self.norm = float(own.float().norm(dim=-1).mean())
            _require_finite(math.isfinite(self.norm), self.base, "hidden states")
        states = (self.unit_states * (self.norm or 1.0)).to(own.device, own.dtype)
        self.states = states
        self.modules.add(module)
        self.dtypes.add(own.dtype)
        if torch.is_autocast_enabled(own.device.type):
            self.dtypes.add(torch.get_autocast_dtype(own.device.type))
        if isinstance(output, tuple):
            return (states[None], *output[1:])
        output["last_hidden_state"] = states[None]
        return output


@torch.no_grad()
def _measure(head: HeadSpec, base: Any, backbone: nn.Module, run: Callable[[Callable[[], Any]], Any]) -> _Measurement:
    hook, name = _RandomStates(base, head), type(base).__name__
    ids = (torch.arange(len(SIZES) * ROWS, device=head.weight.device) % head.weight.shape[0])[None]
    # some forwards call the decoder inside the backbone (OPT)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else backbone
    replaced = {module: None for module in (backbone, decoder) if module is not None and module is not base}
    cuda = [torch.cuda.current_device()] if ids.is_cuda else []
    with (
        eval_mode(base),
        torch.random.fork_rng(devices=cuda),
        _resharded_afterwards(base),
        contextlib.ExitStack() as on,
    ):
        for module in replaced:
            on.callback(module.register_forward_hook(hook).remove)
        on.enter_context(_autocast_for_flash(base, head.weight))
        logits = _run(base, run, lambda: base(input_ids=ids, use_cache=False).logits)
        on.close()
        if hook.states is None or hook.own is None:
            raise HeadError(
                f"the forward of {name} does not call its {base.base_model_prefix!r} as a whole, so its logits cannot "
                "be computed from that backbone's hidden states. Compute the loss from its logits."
            )
        if backbone not in hook.modules:
            alone = _run(base, run, lambda: backbone(input_ids=ids, use_cache=False).last_hidden_state)[0].float()
            if not torch.allclose(alone, hook.own.float(), rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
                raise HeadError(
                    f"{name} and its {base.base_model_prefix!r} compute different hidden states, so a loss on the "
                    "latter's would be wrong. Compute the loss from the model's logits."
                )
    coarsest = max(torch.finfo(dtype).eps for dtype in {*hook.dtypes, logits.dtype})
    return _Measurement(hook.states, logits[0], max(TOLERANCE, ULPS * coarsest))


def _run(base: nn.Module, run: Callable[[Callable[[], Any]], Any], forward: Callable[[], Tensor]) -> Tensor:
    try:
        return run(forward)
    except HeadError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise HeadError(
            f"{type(base).__name__} cannot run six tokens, which show whether its logits are a linear map of its "
            f"hidden states: {error}"
        ) from error


def _autocast_for_flash(base: Any, weight: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context in bfloat16 for a float32 model with flash-attention, which has no float32 kernel; else a no-op."""
    flash = "flash" in str(getattr(base.config, "_attn_implementation", ""))
    needed = flash and weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type)
    return torch.autocast(weight.device.type, torch.bfloat16) if needed else contextlib.nullcontext()


@contextlib.contextmanager
def _resharded_afterwards(base: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        for module in base.modules():
            if isinstance(module, FSDPModule):  # a forward without gradient leaves its weights gathered
                module.reshard()


@torch.no_grad()
def _fit(head: HeadSpec, base: Any, measured: _Measurement) -> HeadSpec:
    """Returns `head` with the softcap and scale that fit. Among equally good ones the first of `_candidates` wins."""
    linear = nn.functional.linear(measured.states.to(head.weight.dtype), head.weight, head.bias).float()
    expected = measured.logits.float()

    def best_of(heads: list[HeadSpec]) -> tuple[float, HeadSpec]:
        errors = [_error(h.transform(linear), expected) for h in heads]
        smallest = min(errors)
        at = next(i for i, error in enumerate(errors) if error <= smallest + measured.tolerance / 4)
        return errors[at], heads[at]

    error, best = best_of([replace(head, softcap=cap, scale=scale) for cap, scale in _candidates(base)])
    if not error <= measured.tolerance:
        caps = dict.fromkeys(cap for cap, _ in _candidates(base))
        fitted = [h for cap in caps if (h := _with_fitted_scale(head, cap, linear, expected)) is not None]
        error, best = min([(error, best), *((_error(h.transform(linear), expected), h) for h in fitted)], key=_first)
    if not error <= measured.tolerance:
        finite = not bool(expected.isnan().any() or linear.isnan().any())
        _require_finite(finite, base, "logits")
        raise HeadError(_difference(base, best.transform(linear), expected, error, measured.tolerance))
    return best


def _first(pair: tuple[float, HeadSpec]) -> float:
    return pair[0]


def _candidates(base: Any) -> list[tuple[float | None, float]]:
    """Returns (softcap, scale) pairs, the likeliest first: what most models that read these settings do."""
    caps: list[float | None] = [value for name, value in _settings(base) if "cap" in name]
    factors = [(name, value) for name, value in _settings(base) if "cap" not in name]
    likely = [1.0 / value if name == "logits_scaling" else value for name, value in factors]  # Granite divides
    scales = [*likely, *(1.0 / value for value in likely), 1.0]
    # the last pair caps first and scales then: scale cap tanh(z / cap)
    return [
        pair
        for cap in [*caps, None]
        for scale in scales
        for pair in ([(cap, scale)] if cap is None or scale == 1.0 else [(cap, scale), (cap * scale, scale)])
    ]


def _with_fitted_scale(head: HeadSpec, cap: float | None, linear: Tensor, expected: Tensor) -> HeadSpec | None:
    """Returns `head` with the scale that fits the states of the model's own size best; None if it is not positive."""
    z, logits = linear[:ROWS], expected[:ROWS]
    known = z.isfinite() & logits.isfinite()
    z, logits = z[known], logits[known]
    if cap is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
    scale = float((z * logits).sum() / (z * z).sum())
    return replace(head, softcap=cap, scale=scale) if math.isfinite(scale) and scale > 0 else None


def _error(got: Tensor, expected: Tensor) -> float:
    """Returns the largest relative difference of a row's norm. Entries that are equal, such as -inf, do not differ."""
    difference = torch.where(got == expected, 0.0, got - expected)
    size = torch.where(expected.isfinite(), expected, 0.0).norm(dim=-1)
    errors = difference.norm(dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny)
    return float(errors.nan_to_num(nan=math.inf).max())


def _difference(base: nn.Module, got: Tensor, expected: Tensor, error: float, tolerance: float) -> str:
    difference = torch.where(got == expected, 0.0, (got - expected).abs()).nan_to_num(nan=math.inf)
    rows = difference.amax(dim=-1) / expected.abs().nan_to_num(posinf=0.0, neginf=0.0).amax(dim=-1).clamp_min(1e-30)
    row = int(rows.argmax())
    token = int(difference[row].argmax())
    return (
        f"{type(base).__name__} changes its logits after the linear head in an unknown way. For random hidden states "
        f"of {SIZES[row // ROWS]:g} times the norm of its own, its logit of token {token} is "
        f"{float(expected[row, token]):.6g}; softcap(scale * (hidden @ weight.T + bias)) gives at best "
        f"{float(got[row, token]):.6g} (relative difference {error:.2g}, allowed {tolerance:.2g}). A loss on its "
        "hidden states would be wrong: compute it from the logits (`divergence`)."
    )


def _require_finite(finite: bool, base: nn.Module, what: str) -> None:
    if finite:
        return
    wrong = [name for name, p in base.named_parameters() if not _is_finite(p)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise HeadError(
            f"the weights of {type(base).__name__} hold NaN or infinity: {', '.join(wrong[:3])}{more}. "
            "Load a checkpoint that is not damaged."
        )
    raise HeadError(
        f"the {what} of {type(base).__name__} are not finite, although its weights are: it overflows in this dtype. "
        "Load it in bfloat16 or float32."
    )


def _is_finite(parameter: Any) -> bool:
    local = getattr(parameter, "ds_tensor", parameter).detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return not local.is_floating_point() or bool(local.isfinite().all())
