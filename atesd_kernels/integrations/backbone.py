"""Runs a model's backbone with what its wrapper and its outer forward do beside the head.

Calling the backbone alone would skip two things: an activated LoRA (aLoRA) takes its offsets from peft's own forward,
and a mixture of experts' outer forward computes the auxiliary loss that balances its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .head_spec import HeadError
from .wrappers import through, unwrap, without_wrappers

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class AuxLoss:
    """A mixture of experts' auxiliary loss, as the model's own forward computes it.

    Attributes:
        value: a scalar, a mean over the tokens of the forward.
        coefficient: the model's own factor (`router_aux_loss_coef`); the loss to add is `coefficient * value`.
    """

    value: Tensor
    coefficient: float

    def weighted(self, share: float | Tensor = 1.0) -> Tensor:
        """Returns what to add to a loss, a scalar. `share` is this forward's share of an optimizer step's tokens."""
        return self.coefficient * share * self.value


@dataclass(frozen=True)
class BackboneOutput:
    """The output of a backbone whose forward also computes an auxiliary loss: `(B, L, H)` and the loss."""

    last_hidden_state: Tensor
    aux_loss: AuxLoss | None = None


def aux_loss_of(output: Any) -> AuxLoss | None:
    """Returns the auxiliary loss that belongs to a backbone's output; None if there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> aux_loss_of(SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 4))) is None
        True
    """
    found = getattr(output, "aux_loss", None)
    return found if isinstance(found, AuxLoss) else None


def as_output(output: Any) -> Any:
    """Returns the `BackboneOutput` of a dict that came through a wrapper; other outputs unchanged.

    Inside a wrapper the output is a plain dict: FSDP2 and DeepSpeed look for tensors in dicts, not in our classes.
    """
    if type(output) is not dict:
        return output
    return BackboneOutput(output["last_hidden_state"], AuxLoss(output["aux_loss"], output["coefficient"]))


def backbone_forward(model: Any) -> Callable[..., Any]:
    """Returns the forward of a model's backbone, to be called inside DDP, FSDP2 or DeepSpeed's own forward.

    It is the backbone itself, a module, where neither peft nor the outer forward has anything to add. Its result, a
    dict in the other cases, goes through `as_output`.

    Raises:
        HeadError: the model has no separate backbone, or its configuration or adapter asks for something that only
            its own forward can do.
    """
    base = unwrap(model)
    name, prefix = type(base).__name__, getattr(base, "base_model_prefix", "")
    backbone = getattr(base, prefix, None)
    if not isinstance(backbone, nn.Module) or backbone is base:
        raise HeadError(f"{name} has no separate backbone (looked for '{prefix}').")
    if getattr(base.config, "z_loss_coefficient", 0):
        raise HeadError(
            f"{name} adds a loss on its logits (z_loss_coefficient is {base.config.z_loss_coefficient}), which a loss "
            "on hidden states cannot: set it to 0 in the model's configuration."
        )
    forward: Callable[..., Any] = backbone
    if wants_aux_loss(base):
        aux_loss_coefficient(base)
        forward = partial(_forward_with_aux_loss, base, backbone)
    peft = without_wrappers(model)
    for adapter in _active_adapters(peft):
        if str(getattr(adapter, "peft_type", "")).endswith("XLORA"):
            raise HeadError(
                "X-LoRA runs the model twice to weigh its adapters, which a loss on hidden states cannot: use LoRA."
            )
        if getattr(adapter, "alora_invocation_tokens", None):
            return partial(_forward_of_peft, peft, base, forward)
    return forward


def with_adapter_names(model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a backbone's `forward` that also takes `adapter_names`, as peft's own does: an adapter for each row.

    Only peft's own forward gives them to its layers; a backbone would drop the argument without a word.
    """
    peft = without_wrappers(model)
    if not hasattr(peft, "get_base_model"):
        return forward
    base = unwrap(model)

    def run(**inputs: Any) -> Any:
        named = inputs.get("adapter_names") is not None
        return _forward_of_peft(peft, base, forward, **inputs) if named else forward(**inputs)

    return run


def _active_adapters(peft: Any) -> list[Any]:
    if not hasattr(peft, "get_base_model"):  # a bare model, which may have a peft_config of its own
        return []
    return [peft.peft_config[name] for name in peft.active_adapters]


def _forward_of_peft(peft: Any, base: nn.Module, forward: Callable[..., Any], **inputs: Any) -> Any:
    """Runs `forward` inside peft's own, which tells each layer where an activated adapter begins."""

    def without_empty(*args: Any, **kwargs: Any) -> Any:  # peft adds arguments that a backbone does not know
        return forward(*args, **{k: v for k, v in kwargs.items() if v is not None or k in inputs})

    return through(peft.forward, base, without_empty, **inputs)


def wants_aux_loss(base: Any) -> bool:
    """Whether the model's configuration asks for the auxiliary loss of its experts."""
    return any(getattr(config, "output_router_logits", False) for config in _configs(base))


def _configs(base: Any) -> list[Any]:
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    return [base.config, text]


def aux_loss_coefficient(base: Any) -> float:
    """Returns the factor by which the model adds its auxiliary loss to its own loss. Raises HeadError without one."""
    for holder in (base, *_configs(base)):
        for name in COEFFICIENTS:
            if isinstance(getattr(holder, name, None), (int, float)):
                return float(getattr(holder, name))
    raise HeadError(
        f"the configuration of {type(base).__name__} asks for an auxiliary loss (output_router_logits) and has no "
        "router_aux_loss_coef to weigh it with: set one of the two."
    )


def _forward_with_aux_loss(base: Any, backbone: nn.Module, **inputs: Any) -> Any:
    """Runs the backbone once, then the outer forward on the backbone's finished output, for its auxiliary loss.

    The outer forward is the model's own code, so the loss is the model's own too. It multiplies one row with the head.
    Without gradient there is nothing to balance, and the backbone runs alone.
    """
    if not torch.is_grad_enabled():
        return backbone(**{**inputs, "output_router_logits": False})
    output = backbone(**{**inputs, "output_router_logits": True})
    mask = inputs.get("attention_mask")
    packed = mask is not None and mask.dim() != 2  # a row without padding; the outer forward knows 2-D masks only
    outer = {**inputs, "attention_mask": None if packed else mask}
    outer |= {"output_router_logits": True, "logits_to_keep": 1}
    value = getattr(through(base.forward, backbone, lambda *_, **__: output, **outer), "aux_loss", None)
    name = type(base).__name__
    if not isinstance(value, Tensor):
        raise HeadError(
            f"the configuration of {name} asks for an auxiliary loss (output_router_logits), which its forward does "
            "not return: set output_router_logits to false."
        )
    if output.last_hidden_state.requires_grad and not value.requires_grad and _checkpoints(base):
        raise HeadError(
            f"the auxiliary loss of {name} has no gradient under reentrant gradient checkpointing: set "
            "gradient_checkpointing_kwargs to {'use_reentrant': False}, or output_router_logits to false."
        )
    coefficient = aux_loss_coefficient(base)
    return {"last_hidden_state": output.last_hidden_state, "aux_loss": value, "coefficient": coefficient}


def _checkpoints(base: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
