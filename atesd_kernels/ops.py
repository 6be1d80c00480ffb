"""The losses as operators torch knows: fake implementations for torch.compile, autograd, and the choice of backend.

Gradients are formed in the forward pass, while the logits exist, and scaled in backward. A row's upstream gradient
scales its row of the hidden-state gradient exactly. A trained head mixes rows, so there the caller's row weights go
in (`weighted`, one scalar comes out), or, with arbitrary upstream gradients, backward runs the op again with them.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from . import checks, planning
from .backends import elementwise
from .planning import COMPILED, TORCH
from .shards import Shards
from .spec import DivergenceSpec, LogprobSpec, RowResult, accumulate_dtype, gradient_dtype
from .stats import TokenStats

Outputs = list[Tensor]  # value, stats, hidden_grad, weight_grad, bias_grad; empty where not asked for
NUM_STATS = len(TokenStats._fields)


def _backend(name: str, function: str):
    module = "triton_chunked"
    if name in TORCH:  # eager or compiled
        module = "torch_logprobs" if function == "logprob_rows" else "torch_chunked"
    return getattr(importlib.import_module(f".backends.{module}", __package__), function)


def _outputs(result: RowResult, weighted: bool, row_weight: Tensor | None) -> Outputs:
    value, *rest = result
    if weighted:
        value = (value if row_weight is None else value * row_weight.to(value.dtype)).sum()
    return [value, *(value.new_empty(0) if t is None else t for t in rest)]


def _formed_now(weighted: bool, hidden: bool, weight: bool, bias: bool) -> dict[str, bool]:
    """Which gradients the forward pass forms: none if backward must run the op again anyway."""
    now = weighted or not (weight or bias)
    return {"hidden_grad": now and hidden, "weight_grad": now and weight, "bias_grad": now and bias}


def _fake(rows: Tensor, dtype, weighted: bool, stats: bool, hidden, weight, bias) -> Outputs:
    acc, n = accumulate_dtype(dtype), rows.shape[0]
    return [
        rows.new_empty(() if weighted else (n,), dtype=acc),
        rows.new_empty((NUM_STATS, n), dtype=acc) if stats else rows.new_empty(0, dtype=acc),
        *(
            rows.new_empty(0, dtype=acc) if t is None else torch.empty_like(t, dtype=gradient_dtype(t.dtype))
            for t in (hidden, weight, bias)
        ),
    ]


@torch.library.custom_op("atesd_kernels::linear_divergence", mutates_args=())
def linear_divergence_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
    backend: str,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float | None,
    entry_clip: float | None,
    token_clip: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    chunk_bytes: int | None,
    group: str | None,
    stats: bool,
    weighted: bool,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> Outputs:
    if targets is not None:
        checks.check_targets(targets, mask, Shards(group, student_weight.shape[0], targets.device).vocab)
    grads = _formed_now(weighted, hidden_grad, weight_grad, bias_grad)
    spec = DivergenceSpec(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        softcap=softcap, entry_clip=entry_clip, token_clip=token_clip, logits_dtype=logits_dtype,
        compute_dtype=compute_dtype, chunk_bytes=chunk_bytes, stats=stats, compiled=backend == COMPILED, **grads,
        group=group,
    )  # fmt: skip
    run = _backend(backend, "divergence_rows")
    result = run(
        spec, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, mask,
        row_weight, targets,
    )  # fmt: skip
    return _outputs(result, weighted, row_weight)


@linear_divergence_op.register_fake
def _(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, mask, row_weight,
    targets, backend, divergence, beta, temperature, teacher_temperature, softcap, entry_clip, token_clip,
    logits_dtype, compute_dtype, chunk_bytes, group, stats, weighted, hidden_grad, weight_grad, bias_grad,
):  # fmt: skip
    grads = _formed_now(weighted, hidden_grad, weight_grad, bias_grad)
    tensors = (student_hidden, student_weight, student_bias)
    formed = [t if g else None for t, g in zip(tensors, grads.values(), strict=True)]
    return _fake(student_hidden, compute_dtype, weighted, stats, *formed)


@torch.library.custom_op("atesd_kernels::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    backend: str,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    chunk_bytes: int | None,
    group: str | None,
    stats: bool,
    weighted: bool,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> Outputs:
    checks.check_targets(targets, mask, Shards(group, weight.shape[0], targets.device).vocab)
    grads = _formed_now(weighted, hidden_grad, weight_grad, bias_grad)
    spec = LogprobSpec(
        temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, compute_dtype=compute_dtype,
        chunk_bytes=chunk_bytes, stats=stats, compiled=backend == COMPILED, group=group, **grads,
    )  # fmt: skip
    result = _backend(backend, "logprob_rows")(spec, hidden, weight, bias, targets, mask, row_weight)
    return _outputs(result, weighted, row_weight)


@linear_logprobs_op.register_fake
def _(
    hidden, weight, bias, targets, mask, row_weight, backend, temperature, softcap, logits_dtype, compute_dtype,
    chunk_bytes, group, stats, weighted, hidden_grad, weight_grad, bias_grad,
):  # fmt: skip
    grads = _formed_now(weighted, hidden_grad, weight_grad, bias_grad)
    formed = [t if g else None for t, g in zip((hidden, weight, bias), grads.values(), strict=True)]
    return _fake(hidden, compute_dtype, weighted, stats, *formed)


@torch.library.custom_op("atesd_kernels::exposure_means", mutates_args=())
def exposure_means_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Tensor,
    exposed: Tensor,
    mask: Tensor,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Tensor:
    checks.check_targets(targets, mask, weight.shape[0])
    spec = LogprobSpec(
        temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, compute_dtype=compute_dtype,
        chunk_bytes=None, stats=False, hidden_grad=False, weight_grad=False, bias_grad=False,
    )  # fmt: skip
    from .backends.triton_exposure import exposure_means

    return exposure_means(spec, hidden, weight, bias, targets, lengths, exposed, mask)


@exposure_means_op.register_fake
def _(hidden, weight, bias, targets, lengths, exposed, mask, temperature, softcap, logits_dtype, compute_dtype):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("atesd_kernels::divergence", mutates_args=())
def divergence_op(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    backend: str,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float | None,
    entry_clip: float | None,
    token_clip: float | None,
    chunk_bytes: int | None,
    stats: bool,
    logits_grad: bool,
) -> Outputs:
    if targets is not None:
        checks.check_targets(targets, mask, student_logits.shape[1])
    dtype = student_logits.dtype
    spec = DivergenceSpec(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        softcap=softcap, entry_clip=entry_clip, token_clip=token_clip, logits_dtype=accumulate_dtype(dtype),
        compute_dtype=dtype, chunk_bytes=chunk_bytes, stats=stats, compiled=backend == COMPILED,
        hidden_grad=logits_grad, weight_grad=False, bias_grad=False,
    )  # fmt: skip
    run = _backend(backend, "divergence_logits")
    return _outputs(run(spec, student_logits, teacher_logits, mask, None, targets), False, None)[:3]


@divergence_op.register_fake
def _(
    student_logits, teacher_logits, mask, targets, backend, divergence, beta, temperature, teacher_temperature,
    softcap, entry_clip, token_clip, chunk_bytes, stats, logits_grad,
):  # fmt: skip
    grad = student_logits if logits_grad else None
    return _fake(student_logits, student_logits.dtype, False, stats, grad, None, None)[:3]


def last_use() -> bool:
    """Whether the backward pass under way frees its graph: what was saved for it may then be overwritten."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not torch.compiler.is_compiling() and not keeps()


def times(grad: Tensor, scale: Tensor) -> Tensor:
    """`grad * scale`, with `scale` one number or one for each row; in the place of `grad` where the graph is freed.

    Batched gradients (functorch's) are one tensor for several backward passes: nothing is overwritten for those.
    """
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(scale) or functorch.is_legacy_batchedtensor(scale)
    if batched or not last_use():
        if scale.dim() == 0 and grad.is_cuda:  # a GPU would round a number without dimensions to grad's dtype
            return (grad * scale.reshape([1] * grad.dim())).to(grad.dtype)
        return grad * scale
    grad = grad.detach()
    on_gpu = grad.is_cuda and grad.dtype != torch.float64 and planning.HAS_TRITON and type(grad) is Tensor
    if scale.dim() == 0 and on_gpu:
        return elementwise.scale_(grad, scale)
    return grad.mul_(scale)


def _register_autograd(op, names: tuple[str, ...], differentiable: tuple[str, ...]) -> None:
    """Backward of an op whose outputs from the third on are the gradients of the inputs named `differentiable`."""
    where = {name: names.index(name) for name in names}
    flags = [names.index(f) for f in names if f.endswith("_grad")]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        weighted = "weighted" in where and inputs[where["weighted"]]
        asked = [inputs[i] for i in flags]
        # rows of a trained head: nothing was formed (_formed_now), backward runs the op again
        ctx.again = any(asked[1:]) and not weighted
        ctx.asked, ctx.weighted = asked, weighted
        ctx.dtypes = {n: inputs[where[n]].dtype for n in differentiable if inputs[where[n]] is not None}
        ctx.options = [None if isinstance(v, Tensor) else v for v in inputs]
        tensors = {i: v for i, v in enumerate(inputs) if isinstance(v, Tensor)}
        kept = tensors if ctx.again else {}
        ctx.tensor_positions = list(kept)
        ctx.save_for_backward(*kept.values(), *([] if ctx.again else output[2:]))

    def backward(ctx, grads):
        upstream, *others = grads
        if any(g is not None for g in others):
            raise RuntimeError(
                f"{op._qualname} has no second derivative: its gradients are constants to autograd. Call backward() "
                "without create_graph=True, or use atesd_kernels.reference for double backward on small inputs."
            )
        result = [None] * len(names)
        if upstream is None:
            return tuple(result)
        if ctx.again:
            arguments = list(ctx.options)
            for position, tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
                arguments[position] = tensor
            arguments[where["row_weight"]], arguments[where["weighted"]] = upstream.contiguous(), True
            arguments[where["stats"]] = False
            formed = op(*arguments)[2:]
        else:
            formed = ctx.saved_tensors
            scale = upstream if ctx.weighted else upstream[:, None]
        for name, grad, asked in zip(differentiable, formed, ctx.asked, strict=True):
            if asked:
                if not ctx.again:
                    grad = times(grad, scale)
                result[where[name]] = grad.to(ctx.dtypes[name])
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)


def _names(op) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._opoverload._schema.arguments)


_register_autograd(
    linear_divergence_op, _names(linear_divergence_op), ("student_hidden", "student_weight", "student_bias")
)
_register_autograd(linear_logprobs_op, _names(linear_logprobs_op), ("hidden", "weight", "bias"))
_register_autograd(divergence_op, _names(divergence_op), ("student_logits",))
