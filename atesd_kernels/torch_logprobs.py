"""Backend "torch" for log-probabilities of given tokens: the one-model sibling of `torch_chunked`."""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_source import StudentLogits
from .planning import ChunkPlan
from .spec import LogprobSpec, RowResult
from .stats import TokenStats


def logprob_rows(
    spec: LogprobSpec,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
) -> RowResult:
    source = StudentLogits(spec, hidden, weight, bias)
    value = torch.zeros(source.num_rows, dtype=source.dtype, device=source.device)
    stats = value.new_zeros(len(TokenStats._fields), source.num_rows) if spec.stats else None
    counted = torch.arange(source.num_rows, device=source.device) if mask is None else mask.nonzero().squeeze(1)
    plan = ChunkPlan.make(len(counted), source.vocab, spec.logits_dtype.itemsize, source.device, spec.chunk_bytes)
    source.scale_gradients(row_weight)
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        source.load(index)
        target = targets[index].long()
        blocks = [source.block(cols) for cols in plan.blocks(source.vocab)]
        lse = torch.stack([z.to(source.dtype).logsumexp(1) for z in blocks]).logsumexp(0)
        at_target, entropy, top = (torch.zeros_like(lse) for _ in range(3))
        top.fill_(-torch.inf)
        for cols, z in zip(plan.blocks(source.vocab), blocks, strict=True):
            column = target - cols.start
            here = (column >= 0) & (column < z.shape[1])
            column = column.clamp(0, z.shape[1] - 1)[:, None]
            at_target = torch.where(here, z.gather(1, column)[:, 0].to(lse.dtype), at_target)
            if spec.stats or spec.any_grad:
                for tile in plan.tiles(len(index)):
                    q = (z[tile].to(lse.dtype) - lse[tile, None]).exp_()
                    if spec.stats:
                        entropy[tile] += torch.special.entr(q).sum(1)
                        top[tile] = torch.maximum(top[tile], z[tile].amax(1).to(lse.dtype))
                    if spec.any_grad:
                        weight_i = None if row_weight is None else row_weight[index][tile]
                        _gradient(source, z, tile, q, here[tile], column[tile], weight_i)
            if spec.any_grad:
                source.take_gradient(cols, z.view(spec.compute_dtype)[:, : z.shape[1]])
        source.finish_rows()
        value[index] = at_target - lse
        if stats is not None:
            zero = torch.zeros_like(lse)
            stats[:, index] = torch.stack([zero, entropy, zero, value[index], zero, (top - lse).exp(), zero])
        del blocks, z  # before the next chunk's are made
    return RowResult(value, stats, *source.gradients())


def _gradient(source: StudentLogits, z: Tensor, tile: slice, q: Tensor, here: Tensor, column: Tensor, weight) -> None:
    """Overwrite a tile of logits with d log q[target] / d z = (1[j = target] - q_j) / temperature."""
    spec = source.spec
    g = q.neg_().scatter_add_(1, column, here.to(q.dtype)[:, None])
    if spec.softcap is not None:
        capped = z[tile].to(q.dtype) * (spec.temperature / spec.softcap)
        g = g * (1 - capped * capped)
    g = g / spec.temperature if weight is None else g * (weight.to(q.dtype) / spec.temperature)[:, None]
    if source.grad_scale is not None:
        g = g * source.grad_scale
    z.view(spec.compute_dtype)[tile, : z.shape[1]] = g
