"""Backend "torch" for log-probabilities of given tokens: like `torch_chunked`, but for one model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning import ChunkPlan, chunk_plan
from ..spec import LogprobSpec, RowResult
from ..stats import TokenStats
from . import passes
from .cpp_chunk import rows_fit
from .cpp_logprobs import CppLogprobChunk
from .logit_source import StudentLogits


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
    in_cpp = rows_fit(spec, source)
    plan = chunk_plan(spec, source, len(counted), buffers=1, in_cpp=in_cpp)
    buffer = value.new_empty(min(plan.rows, len(counted)) * source.vocab)
    source.scale_gradients(row_weight)
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        source.load(index)
        weight = None if row_weight is None else row_weight[index].to(source.dtype)
        target = targets[index].long() - source.shards.start
        chunk = (CppLogprobChunk if in_cpp else LogprobChunk)(spec, source, plan, buffer, target, weight)
        value[index] = chunk.at_target - chunk.lse
        if stats is not None:
            stats[:, index] = chunk.stats(value[index])
        if spec.any_grad:
            chunk.gradient()
    return RowResult(value, stats, *source.gradients())


class LogprobChunk:
    """Holds the kept logits (see `Scaling`) of some rows, block by block. `gradient` replaces them in place."""

    def __init__(
        self,
        spec: LogprobSpec,
        source: StudentLogits,
        plan: ChunkPlan,
        buffer: Tensor,
        target: Tensor,
        weight: Tensor | None,
    ):
        self.spec, self.source, self.target, self.weight = spec, source, target, weight
        self.cols, self.tiles = plan.blocks(source.vocab), list(plan.tiles(len(target)))
        self.run = passes.compiled if spec.compiled else lambda function: function
        rows = len(target)
        self.z = [buffer[rows * c.start : rows * c.stop].view(rows, -1) for c in self.cols]
        lse_b, top_b = buffer.new_empty(2, len(self.cols), rows)
        self.at_target = buffer.new_zeros(rows)
        scratch = torch.empty_like(self.z[0][: plan.tile_rows])
        for b, cols in enumerate(self.cols):
            z = self.z[b].copy_(source.block(cols))
            here, column = self._target_in(b)
            at_target = self.source.scaling.student(z.gather(1, column)[:, 0])
            self.at_target = torch.where(here, at_target, self.at_target)
            for tile in self.tiles:
                out = scratch[: z[tile].shape[0], : z.shape[1]]
                top_b[b, tile], lse_b[b, tile] = self.run(passes.block_softmax)(source.scaling.student(z[tile]), out)
        shards = source.shards
        self.lse, (self.top,) = shards.logsumexp(lse_b.logsumexp(0)), shards.select_at_global_argmax(top_b.amax(0))
        (self.at_target,) = shards.sum(self.at_target)  # only one shard contains the target

    def _target_in(self, b: int) -> tuple[Tensor, Tensor]:
        """Returns whether each row's target is in the block, `[R]`, and its column `[R, 1]` (arbitrary if not)."""
        column, width = self.target - self.cols[b].start, self.z[b].shape[1]
        return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]

    def probs(self, b: int, tile: slice) -> Tensor:
        """Returns q, `[r, C]`."""
        return (self.source.scaling.student(self.z[b][tile]) - self.lse[tile, None]).exp_()

    def stats(self, value: Tensor) -> Tensor:
        entropy, zero = torch.zeros_like(self.lse), torch.zeros_like(self.lse)
        for b in range(len(self.cols)):
            for tile in self.tiles:
                entropy[tile] += torch.special.entr(self.probs(b, tile)).sum(1)
        (entropy,) = self.source.shards.sum(entropy)
        return torch.stack([zero, entropy, zero, value, zero, (self.top - self.lse).exp(), zero])

    def gradient(self) -> None:
        """Passes d log q[target] / d z = (1[j = target] - q_j) / temperature, times the row's weight, to the source."""
        source, spec = self.source, self.spec
        factor = torch.full_like(self.lse, 1 / spec.temperature)
        for f in (self.weight, source.grad_scale):
            factor = factor if f is None else factor * f
        late = source.scales_late and spec.softcap is None
        for b, cols in enumerate(self.cols):
            here, column = self._target_in(b)
            out = source.gradient_storage(self.z[b])
            for tile in self.tiles:
                g = self.probs(b, tile).neg_()
                g.scatter_add_(1, column[tile], here[tile].to(g.dtype)[:, None])
                if spec.softcap is not None:
                    g *= source.scaling.slope(self.z[b][tile])
                out[tile] = g if late else g * factor[tile, None]
            source.take_gradient(cols, out, factor if late else None)
        source.finish_rows()
