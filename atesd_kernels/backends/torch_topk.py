"""Backend "torch" against a teacher known by its top K entries: `torch_logprobs` with K targets and a rest.

The logits at the ids are read while a block is there, and replaced by -inf. Every sweep over the buffer then sees the
other entries only, so the rest is their sum and never 1 minus the sum of the listed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..planning import ChunkPlan
from ..spec import RowResult, TopkSpec
from ..stats import TokenStats
from . import passes
from .logit_source import GivenLogits, StudentLogits
from .topk_entries import BYTES_PER_ENTRY, Extremes, Student, compare, statistics


def topk_rows(
    spec: TopkSpec,
    student_hidden: Tensor,  # [N, H]
    student_weight: Tensor,  # [V, H]
    student_bias: Tensor | None,  # [V]
    teacher_ids: Tensor,  # [N, K], -1: padding
    teacher_logprobs: Tensor,  # [N, K]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
    targets: Tensor | None,  # [N]
) -> RowResult:
    source = StudentLogits(replace(spec, logits_dtype=logits_dtype(spec)), student_hidden, student_weight, student_bias)
    return _run(spec, source, teacher_ids, teacher_logprobs, mask, row_weight, targets)


def topk_logits(
    spec: TopkSpec,
    student_logits: Tensor,  # [N, V]
    teacher_ids: Tensor,  # [N, K], -1: padding
    teacher_logprobs: Tensor,  # [N, K]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
    targets: Tensor | None,  # [N]
) -> RowResult:
    """Runs the same sweeps over the caller's logits. The result's `hidden_grad` is the gradient of `student_logits`."""
    source = GivenStudentLogits(spec, student_logits)
    return _run(spec, source, teacher_ids, teacher_logprobs, mask, row_weight, targets)


def _run(spec: TopkSpec, source, teacher_ids, teacher_logprobs, mask, row_weight, targets) -> RowResult:
    value = torch.zeros(source.num_rows, dtype=source.dtype, device=source.device)
    stats = value.new_zeros(len(TokenStats._fields), source.num_rows) if spec.stats else None
    counted = torch.arange(source.num_rows, device=source.device) if mask is None else mask.nonzero().squeeze(1)
    plan = topk_plan(spec, source, len(counted), teacher_ids.shape[1])
    buffer = torch.empty(
        min(plan.rows, len(counted)) * source.vocab, dtype=buffer_dtype(spec, source.dtype), device=source.device
    )
    source.scale_gradients(row_weight)
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        source.load(index)
        ids = teacher_ids[index].long()
        log_p = torch.where(ids >= 0, teacher_logprobs[index].double(), -torch.inf)
        target = None if targets is None else targets[index]
        chunk = TopkChunk(spec, source, plan, buffer, ids, target)
        result = compare(spec, chunk.student, log_p)
        value[index] = result.value.to(value.dtype)
        if stats is not None:
            stats[:, index] = statistics(
                spec, chunk.student, chunk.extremes(), result.raw, log_p, ids, target
            ).to(value.dtype)  # fmt: skip
        if spec.any_grad:
            weight = None if row_weight is None else row_weight[index].double()
            chunk.gradient(*chunk.row_factors(result.grad, result.grad_rest, weight))
    return RowResult(value, stats, *source.gradients())


class GivenStudentLogits(GivenLogits):
    """The interface of `StudentLogits` over the caller's logits."""

    def __init__(self, spec: TopkSpec, student_logits: Tensor):
        super().__init__(spec, student_logits, student_logits)

    block = GivenLogits.student


def logits_dtype(spec: TopkSpec) -> torch.dtype:
    """Returns the dtype of the head's product. As for separate heads, fp64 for fp32 inputs: the loss depends on the
    difference between these logits and the teacher's log-probabilities."""
    exact = spec.compute_dtype == spec.logits_dtype == torch.float32
    return torch.float64 if exact else spec.logits_dtype


def buffer_dtype(spec: TopkSpec, accumulate: torch.dtype) -> torch.dtype:
    return torch.promote_types(logits_dtype(spec), accumulate)


def topk_plan(spec: TopkSpec, source, num_rows: int, entries: int) -> ChunkPlan:
    """Returns `planning.chunk_plan` for one buffer, and for what the listed entries of a row take."""
    itemsize = buffer_dtype(spec, source.dtype).itemsize
    vocab = source.vocab + -(-entries * BYTES_PER_ENTRY // itemsize)
    plan = ChunkPlan.make(num_rows, vocab, itemsize, source.device, spec.chunk_bytes, 4 * itemsize, spec.compiled)
    return replace(plan, rows=source.shards.all_reduce_min(plan.rows, source.device))


class TopkChunk:
    """Holds the kept logits (see `Scaling`) of some rows, block by block, -inf at the ids. `gradient` replaces them.

    Attributes:
        listed: `[R, K]` float64 kept logits at the ids, -inf where an id is padding.
        student: see `topk_entries`.
    """

    def __init__(self, spec: TopkSpec, source, plan: ChunkPlan, buffer: Tensor, ids: Tensor, target: Tensor | None):
        self.spec, self.source, self.scaling, self.ids = spec, source, source.scaling, ids
        self.cols, self.tiles = plan.blocks(source.vocab), list(plan.tiles(len(ids)))
        self.run = passes.compiled if spec.compiled else lambda function: function
        rows, shards = len(ids), source.shards
        self.z = [buffer[rows * c.start : rows * c.stop].view(rows, -1) for c in self.cols]
        here = (ids >= shards.start) & (ids < shards.start + source.vocab)
        self.row, self.place = here.nonzero(as_tuple=True)
        self.column = ids[self.row, self.place] - shards.start
        listed = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        self.at_target = listed.new_zeros(rows)
        lse_b, top_b = listed.new_empty(2, len(self.cols), rows)
        for b, cols in enumerate(self.cols):
            z = source.block(cols)
            if target is not None:
                self._take_target(target - shards.start - cols.start, z)
            which, where = self._listed_in(cols)
            listed[self.row[which], self.place[which]] = z[where].double()
            z = self.z[b].copy_(z)
            z[where] = -torch.inf
            for tile in self.tiles:
                top, total = self.run(passes.block_sums)(self.scaling.student(z[tile]))
                top_b[b, tile], lse_b[b, tile] = top, top + total.double().log()
        listed, self.at_target = (shards.sum(x)[0] for x in (listed, self.at_target))  # others' shards add 0
        self.listed = torch.where(ids >= 0, listed, -torch.inf)
        rest = shards.logsumexp(lse_b.logsumexp(0))
        (self.top,) = shards.select_at_global_argmax(top_b.amax(0))
        self.student = Student(self.scaling.student(self.listed), rest)
        self.shift = torch.where(torch.isneginf(rest), 0.0, rest).to(buffer.dtype)

    def _listed_in(self, cols: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns which of the listed entries lie in the block, and their index in it."""
        which = ((self.column >= cols.start) & (self.column < cols.stop)).nonzero()[:, 0]
        return which, (self.row[which], self.column[which] - cols.start)

    def _take_target(self, column: Tensor, z: Tensor) -> None:
        row = ((column >= 0) & (column < z.shape[1])).nonzero()[:, 0]
        self.at_target[row] = self.scaling.student(z[row, column[row]].double())

    def extremes(self) -> Extremes:
        entropy = torch.zeros_like(self.top)
        lse = self.student.lse.to(self.shift.dtype)
        for z in self.z:
            for tile in self.tiles:
                entropy[tile] += torch.special.entr((self.scaling.student(z[tile]) - lse[tile, None]).exp_()).sum(1)
        (entropy,) = self.source.shards.sum(entropy)
        return Extremes(entropy, self.top, self.at_target)

    def row_factors(self, grad: Tensor, grad_rest: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the derivatives by kept or raw logits at the ids `[R, K]`, and the rest's factor `[R]`."""
        factor = torch.full_like(grad_rest, 1 / self.spec.temperature)
        for f in (weight, self.source.grad_scale):
            factor = factor if f is None else factor * f
        grad = grad * factor[:, None]
        if self.spec.softcap is not None:
            grad = grad * self.scaling.slope(self.listed)
        return grad, (grad_rest * factor).to(self.shift.dtype)

    def gradient(self, grad: Tensor, factor: Tensor) -> None:
        """Passes the gradient to the source: `grad` at the ids, and elsewhere softmax_rest(s)_j times `factor`."""
        for b, cols in enumerate(self.cols):
            out = self.source.gradient_storage(self.z[b])
            for tile in self.tiles:
                z = self.z[b][tile]
                slope = None if self.spec.softcap is None else self.scaling.slope(z)
                out[tile] = self.run(passes.rest_gradient)(
                    self.scaling.student(z), self.shift[tile], factor[tile], slope
                )
            which, where = self._listed_in(cols)
            out[where] = grad[self.row[which], self.place[which]].to(out.dtype)
            self.source.take_gradient(cols, out)
        self.source.finish_rows()
