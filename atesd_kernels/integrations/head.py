"""Splits a causal language model into its backbone and its head.

A loss on hidden states needs both parts: the backbone maps tokens to hidden states; the head is the linear map (with
bias, softcap and scale) to logits. This file finds them under the usual wrappers. It raises an error for a head that is
not such a linear map, because a missing bias or softcap would silently train on wrong logits. It is duck-typed and
imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .backbone import as_output, backbone_forward, with_adapter_names
from .head_spec import HeadError, HeadSpec
from .logit_probe import with_measured_transform
from .sharded_head import gathered_head
from .wrappers import through, unwrap

__all__ = ["HeadError", "HeadSpec", "hidden_states_and_head", "through", "unwrap"]


def hidden_states_and_head(model: nn.Module) -> tuple[Callable[..., Any], HeadSpec]:
    """Splits `model` into its backbone and its head, and checks that both give its logits.

    The check runs six tokens through the model, the first time that it is seen (see `logit_probe`). Where weights are
    sharded, that is a collective: all ranks must make this call.

    Args:
        model: a causal language model of transformers, bare or wrapped by peft, DDP, FSDP2 (`fully_shard`) or
            torch.compile (the backbone then runs uncompiled). The wrapper's own forward runs the backbone.

    Returns:
        `(backbone, head)`. `backbone(input_ids=..., ...)` returns an output whose `last_hidden_state` is
        `(batch, length, hidden)`, adapters included; it takes peft's `adapter_names` too. Where the configuration asks
        for a mixture of experts' auxiliary loss (`output_router_logits`), a forward with gradient also returns that:
        see `backbone.aux_loss_of`. `head` is a `HeadSpec` that maps the rows to logits. A head sharded by FSDP2 or
        DeepSpeed's ZeRO-3 is gathered: see `sharded_head`.

    Raises:
        HeadError: a `ValueError`: there is no head, it has an adapter or a wrapper or is not a plain linear layer, the
            model's logits are not a linear map of its hidden states with a softcap and a scale, its weights are not
            finite, its configuration asks for an auxiliary loss that it does not compute, the model is under FSDP1, or
            a trained head is under FSDP2 (before `gather_head`) or ZeRO-3.

    Example:
        >>> backbone, head = hidden_states_and_head(model)
        >>> hidden = backbone(input_ids=ids).last_hidden_state
        >>> loss = linear_divergence(hidden, head.weight, teacher_hidden, softcap=head.softcap)
    """
    if isinstance(model, FullyShardedDataParallel):
        raise HeadError(
            "the model is wrapped by FullyShardedDataParallel (FSDP1), so its head cannot be accessed. "
            "Use fully_shard (FSDP2) or DDP."
        )
    base = unwrap(model)
    head = _linear_head(base)
    zero3 = hasattr(head.weight, "ds_id")
    root: Any = model if zero3 else next((m for m in (model, base) if isinstance(m, FSDPModule)), None)
    weight, bias = head.weight, head.bias
    if root is not None or isinstance(weight, DTensor):
        weight, bias = gathered_head(head, type(base).__name__)
    forward = with_adapter_names(model, backbone_forward(model))

    def run(function: Callable[[], Any]) -> Any:
        return function() if root is None else through(root, root, function)

    spec = with_measured_transform(HeadSpec(weight, bias), base, getattr(base, base.base_model_prefix), run)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _with_output(partial(through, model, model.module, forward)), spec
    if root is not None:
        return _with_output(partial(through, root, root, forward)), spec
    return forward if isinstance(forward, nn.Module) else _with_output(forward), spec


def _with_output(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: as_output(call(**inputs))


def _linear_head(base: Any) -> Any:
    """Returns the head of a causal language model, a linear layer. Raises HeadError if it is anything else."""
    name = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise HeadError(f"{name} has no output embeddings; pass a causal language model with a linear head.")
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise HeadError(
            f"the head of {name} carries an adapter ({type(head).__name__}), which the fused losses would ignore. "
            "Leave lm_head out of target_modules ('all-linear' already does)."
        )
    if hasattr(head, "modules_to_save"):
        raise HeadError(
            f"the head of {name} is in modules_to_save, so teacher and student would silently use different copies. "
            "Take lm_head out of modules_to_save, or train all parameters without peft."
        )
    if type(head) is not nn.Linear and type(head).__bases__ != (FSDPModule, nn.Linear):  # fully_shard's own class
        raise HeadError(f"the head of {name} is a {type(head).__name__}, not torch.nn.Linear: load it unquantised.")
    if head.weight.dim() != 2 and not hasattr(head.weight, "ds_id"):
        raise HeadError(
            f"the head weight of {name} has shape {tuple(head.weight.shape)}: it is sharded by FSDP1 and this rank "
            "lacks its values. Use DDP, ZeRO or fully_shard (FSDP2)."
        )
    return head
