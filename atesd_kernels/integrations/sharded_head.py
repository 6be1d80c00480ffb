"""The head of a model that FSDP2 (`fully_shard`) shards, whole on every rank: once a step, not once a micro-batch.

Between a forward and its backward FSDP2 lends a module's weights unsharded and frees them then, and it reduces
gradients around that module's own forward only. A loss on hidden states uses the head outside of its forward, so it
gets a whole tensor of its own here, the same object for all callers. A frozen head is gathered when it is first asked
for. A trained one takes two calls a step:

    gather_head(model)             # at the start, and after each optimizer step
    ... any number of forward and backward passes over hidden_states_and_head(model) ...
    reduce_head_gradient(model)    # after the last backward, before the gradient's norm is clipped

Memory on every rank, beside the shards: the whole weight, and its gradient where it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from .wrappers import unwrap


@dataclass
class _Whole:
    weight: Tensor
    bias: Tensor | None
    version: int  # of the shards the values came from


_WHOLE: WeakKeyDictionary[nn.Module, _Whole] = WeakKeyDictionary()


def whole_head(head: nn.Linear, name: str) -> tuple[Tensor, Tensor | None]:
    """The whole weight and bias of a head that FSDP2 manages; `name` is the model's, for the error."""
    known = _WHOLE.get(head)
    if head.weight.requires_grad:
        if known is None and hasattr(head.weight, "ds_id"):
            raise ValueError(
                f"the head of {name} is trained and sharded by DeepSpeed ZeRO-3, which takes gradients from its "
                "engine's own forward only: freeze it (LoRA), or use ZeRO-2, DDP or fully_shard (FSDP2)."
            )
        if known is None:
            raise ValueError(
                f"the head of {name} is trained and sharded by fully_shard, which reduces gradients inside its own "
                "forward only. Call gather_head(model) first and after each optimizer step, and "
                "reduce_head_gradient(model) before it (atesd_kernels.integrations.sharded_head)."
            )
    elif known is None or (isinstance(head.weight, DTensor) and known.version != head.weight._version):
        known = _WHOLE[head] = _Whole(*_gathered(head), head.weight._version)
    return known.weight, known.bias


def _gathered(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    def whole(t: Tensor) -> Tensor:
        if hasattr(t, "ds_id"):  # DeepSpeed's ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([t]):
                return t.detach().clone()
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()

    return whole(head.weight), None if head.bias is None else whole(head.bias)


@torch.no_grad()
def gather_head(model: Any) -> None:
    """Make a trained head's weight (and bias) whole, as its shards are now. All ranks call it.

    The tensors of an earlier call are written anew, so that a `HeadSpec` from before stays valid.
    """
    base = unwrap(model)
    head = base.get_output_embeddings()
    for module in (base, model, head):  # what a forward without gradient has left unsharded
        if isinstance(module, FSDPModule):
            module.reshard()
    weight, bias = _gathered(head)
    known = _WHOLE.get(head)
    if known is None or not known.weight.requires_grad:
        bias = None if bias is None else bias.requires_grad_()
        _WHOLE[head] = _Whole(weight.requires_grad_(), bias, head.weight._version)
        return
    known.weight.copy_(weight)
    if known.bias is not None and bias is not None:
        known.bias.copy_(bias)


@torch.no_grad()
def reduce_head_gradient(model: Any, average: bool = False) -> None:
    """Add the gradient that losses have left on the whole head to that of its shards, summed over ranks, and clear it.

    Args:
        average: divide by the number of ranks, as FSDP2 does unless it is told otherwise
            (`set_gradient_divide_factor`). All ranks call it.
    """
    head = unwrap(model).get_output_embeddings()
    known = _WHOLE[head]
    for whole, shard in ((known.weight, head.weight), (known.bias, head.bias)):
        if whole is None:
            continue
        local = torch.zeros_like(whole) if whole.grad is None else whole.grad
        if average:
            local = local / shard.device_mesh.size()
        reduced = DTensor.from_local(local, shard.device_mesh, [Partial()] * shard.device_mesh.ndim)
        reduced = reduced.redistribute(placements=shard.placements)
        shard.grad = reduced if shard.grad is None else shard.grad + reduced
        whole.grad = None
