"""Gathers the head of a model sharded by FSDP2 (`fully_shard`) on every rank, once per step.

FSDP2 gathers a module's weights for the module's own forward and backward only, then frees them. It also reduces
gradients around that forward only. A loss on hidden states uses the head outside its forward, so this file gathers the
head into a separate tensor, the same object for all callers. A frozen head is gathered at its first use. A trained one
needs two calls per step:

    gather_head(model)             # at the start, and after each optimizer step
    ... any number of forward and backward passes over hidden_states_and_head(model) ...
    reduce_head_gradient(model)    # after the last backward, before the gradient's norm is clipped

Every rank needs memory for the full weight in addition to its shard, and for the full gradient if the head is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from .head_spec import HeadError
from .wrappers import unwrap


@dataclass
class _GatheredHead:
    weight: Tensor
    bias: Tensor | None
    version: int  # version of the shards when they were gathered


_GATHERED: WeakKeyDictionary[nn.Module, _GatheredHead] = WeakKeyDictionary()


def gathered_head(head: nn.Linear, name: str) -> tuple[Tensor, Tensor | None]:
    """Returns the gathered weight `[V, H]` and bias `[V]` of a sharded head. `name` is the model's, for messages."""
    known = _GATHERED.get(head)
    if head.weight.requires_grad:
        if known is None and hasattr(head.weight, "ds_id"):
            raise HeadError(
                f"the head of {name} is trained and sharded by DeepSpeed ZeRO-3, which reduces gradients inside its "
                "engine's own forward only. Freeze the head (LoRA), or use ZeRO-2, DDP or fully_shard (FSDP2)."
            )
        if known is None:
            raise HeadError(
                f"the head of {name} is trained and sharded by fully_shard, which reduces gradients inside its own "
                "forward only. Call gather_head(model) first and after each optimizer step, and "
                "reduce_head_gradient(model) before it (atesd_kernels.integrations.sharded_head)."
            )
    elif known is None or (isinstance(head.weight, DTensor) and known.version != head.weight._version):
        known = _GATHERED[head] = _GatheredHead(*_gathered(head), head.weight._version)
    return known.weight, known.bias


def _gathered(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    def full(t: Tensor) -> Tensor:
        if hasattr(t, "ds_id"):  # DeepSpeed's ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([t]):
                return t.detach().clone()
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()

    return full(head.weight), None if head.bias is None else full(head.bias)


@torch.no_grad()
def gather_head(model: Any) -> None:
    """Gathers the current weight (and bias) of a trained head. All ranks must call it.

    A later call overwrites the tensors of the first in place, so an earlier `HeadSpec` stays valid.
    """
    base = unwrap(model)
    head = base.get_output_embeddings()
    for module in (base, model, head):  # a forward without gradient leaves them unsharded
        if isinstance(module, FSDPModule):
            module.reshard()
    weight, bias = _gathered(head)
    known = _GATHERED.get(head)
    if known is None or not known.weight.requires_grad:
        bias = None if bias is None else bias.requires_grad_()
        _GATHERED[head] = _GatheredHead(weight.requires_grad_(), bias, head.weight._version)
        return
    known.weight.copy_(weight)
    if known.bias is not None and bias is not None:
        known.bias.copy_(bias)


@torch.no_grad()
def reduce_head_gradient(model: Any, average: bool = False) -> None:
    """Reduce-scatters the gathered head's gradient into the gradient of its shards, and clears it. All ranks must call
    it.

    Args:
        average: divide by the number of ranks, like FSDP2's default (see `set_gradient_divide_factor`).
    """
    head = unwrap(model).get_output_embeddings()
    known = _GATHERED[head]
    for gathered, shard in ((known.weight, head.weight), (known.bias, head.bias)):
        if gathered is None:
            continue
        local = torch.zeros_like(gathered) if gathered.grad is None else gathered.grad
        if average:
            local = local / shard.device_mesh.size()
        reduced = DTensor.from_local(local, shard.device_mesh, [Partial()] * shard.device_mesh.ndim)
        reduced = reduced.redistribute(placements=shard.placements)
        shard.grad = reduced if shard.grad is None else shard.grad + reduced
        gathered.grad = None
