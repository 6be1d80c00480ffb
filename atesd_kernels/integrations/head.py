"""Splits a causal language model into its backbone and its head.

A loss on hidden states needs both parts: the backbone maps tokens to hidden states; the head is the linear map (with
bias, softcap and scale) to logits. This file finds them under the usual wrappers. It raises an error for a head that is
not such a linear map, because a missing bias or softcap would silently train on wrong logits. It is duck-typed and
imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .sharded_head import gathered_head
from .wrappers import through, unwrap


@dataclass(frozen=True)
class HeadSpec:
    """`logits = softcap(scale * (hidden @ weight.T + bias))`, with `softcap(z) = softcap * tanh(z / softcap)`.

    Attributes:
        weight: `(vocab, hidden)`, the model's own parameter, not a copy.
        bias: `(vocab,)` or None.
        softcap: final logit softcap (Gemma) or None.
        scale: factor on the logits (Cohere, Granite, Falcon-H1); 1.0 for most models.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def temperature(self, temperature: float) -> float:
        """Returns a temperature that includes `scale`: `softmax(scale * z / T) = softmax(z / (T / scale))`."""
        return temperature / self.scale

    def divergence_options(self, temperature: float = 1.0, teacher: HeadSpec | None = None) -> dict[str, Any]:
        """Returns the options of `linear_divergence` for this head: biases, softcap, and scales as temperatures.

        Args:
            temperature: of both distributions.
            teacher: the teacher's head (default: this one).

        Raises:
            ValueError: if the two heads have different softcaps. The losses take only one.
        """
        teacher = self if teacher is None else teacher
        if teacher._inner_softcap != self._inner_softcap:
            raise ValueError(
                f"student and teacher have different logit softcaps ({self.softcap} and {teacher.softcap}): "
                "linear_divergence takes one softcap for both. Use a teacher of the same family."
            )
        return {
            "temperature": self.temperature(temperature),
            "teacher_temperature": teacher.temperature(temperature),
            "softcap": self._inner_softcap,
            "student_bias": self.bias,
            "teacher_bias": teacher.bias,
        }

    def logprob_options(self, temperature: float = 1.0) -> dict[str, Any]:
        """Returns the options of `linear_logprobs` for this head."""
        return {"temperature": self.temperature(temperature), "softcap": self._inner_softcap, "bias": self.bias}

    @property
    def _inner_softcap(self) -> float | None:
        """The losses cap before they scale: cap tanh(scale z / cap) = scale (cap/scale) tanh(z / (cap/scale))."""
        return self.softcap / self.scale if self.softcap else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns dense logits `[..., V]`. Use it for checks and single rows, not for a batch."""
        z = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def hidden_states_and_head(model: nn.Module) -> tuple[Callable[..., Any], HeadSpec]:
    """Splits `model` into its backbone and its head.

    Args:
        model: a causal language model of transformers, bare or wrapped by peft, DDP, FSDP2 (`fully_shard`) or
            torch.compile (the backbone then runs uncompiled). The wrapper's own forward runs the backbone.

    Returns:
        `(backbone, head)`. `backbone(input_ids=..., ...)` returns an output whose `last_hidden_state` is
        `(batch, length, hidden)`, adapters included. `head` is a `HeadSpec` that maps its rows to logits. A head
        sharded by FSDP2 or DeepSpeed's ZeRO-3 is gathered: see `sharded_head`.

    Raises:
        ValueError: if there is no head, the head has an adapter or a wrapper or is not a plain linear layer, the model
            is under FSDP1, a trained head is under FSDP2 (before `gather_head`) or ZeRO-3, or there are both a softcap
            and a scale.

    Example:
        >>> backbone, head = hidden_states_and_head(model)
        >>> hidden = backbone(input_ids=ids).last_hidden_state
        >>> loss = linear_divergence(hidden, head.weight, teacher_hidden, softcap=head.softcap)
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel (FSDP1), so its head cannot be accessed. "
            "Use fully_shard (FSDP2) or DDP."
        )
    base = unwrap(model)
    name = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{name} has no output embeddings; pass a causal language model with a linear head.")
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"the head of {name} carries an adapter ({type(head).__name__}), which the fused losses would ignore. "
            "Leave lm_head out of target_modules ('all-linear' already does)."
        )
    if hasattr(head, "modules_to_save"):
        raise ValueError(
            f"the head of {name} is in modules_to_save, so teacher and student would silently use different copies. "
            "Take lm_head out of modules_to_save, or train all parameters without peft."
        )
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):  # fully_shard's own class
        raise ValueError(f"the head of {name} is a {type(head).__name__}, not torch.nn.Linear: load it unquantised.")
    zero3 = hasattr(head.weight, "ds_id")
    if head.weight.dim() != 2 and not zero3:
        raise ValueError(
            f"the head weight of {name} has shape {tuple(head.weight.shape)}: it is sharded by FSDP1 and this rank "
            "lacks its values. Use DDP, ZeRO or fully_shard (FSDP2)."
        )
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    root: Any = model if zero3 else next((m for m in (model, base) if isinstance(m, FSDPModule)), None)
    if root is not None:
        weight, bias = gathered_head(head, name)
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"{name} has no separate backbone (looked for '{getattr(base, 'base_model_prefix', '')}').")
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "lm_head_multiplier", None) is not None:  # Falcon-H1
        scale = float(config.lm_head_multiplier)
    if softcap and scale != 1.0:
        raise ValueError(f"{name} has both a logit softcap ({softcap}) and a scale ({scale}); their order is unknown.")
    call: Callable[..., Any] = backbone
    if isinstance(model, nn.parallel.DistributedDataParallel):
        call = partial(through, model, model.module, backbone)
    elif root is not None:
        call = partial(through, root, root, backbone)
    return call, HeadSpec(weight, bias, float(softcap) if softcap else None, scale)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Runs two tokens and compares `HeadSpec.logits` with the model's own logits.

    This detects transformations of the logits that the configuration does not name.

    Raises:
        ValueError: if they differ by more than 1 % of the logits' norm.
    """
    base = unwrap(model)
    backbone, head = hidden_states_and_head(model)
    training = base.training
    base.eval()  # dropout would make the two passes differ
    try:
        input_ids = torch.tensor([[0, 1]], device=head.weight.device)
        expected = base(input_ids=input_ids, use_cache=False).logits.float()
        hidden = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        got = head.logits(hidden.to(head.weight.dtype)).float()
    finally:
        base.train(training)
    error = float((got - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ValueError(
            f"{type(base).__name__} changes its logits after the linear head in an unknown way (relative difference "
            f"{error:.2g}): a loss on its hidden states would be wrong."
        )
