"""Backend "triton" against a teacher known by its top K entries: GEMMs, and the sweeps of `logprob_rows`.

The logits at the ids are taken out of a chunk (`kernels/topk.py`). The first sweep of `kernels/logprobs.py` then gives
the rest's normaliser. The second one's gradient, which without a target is that of minus this normaliser, gives the
rest's share of the gradient. The K + 1 numbers of a row are compared in torch (`topk_entries`), so a divergence needs
no Triton function here. Nothing synchronises with the device. With `group=` a shard takes out the ids that lie in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import logprobs as logprob_kernels
from ..kernels import topk as topk_kernels
from ..shards import Shards
from ..spec import RowResult, TopkSpec, gradient_dtype
from ..stats import TokenStats
from . import matmul, tuning
from .elementwise import on
from .scaling import Scaling
from .topk_entries import BYTES_PER_ENTRY, Extremes, Student, compare, statistics
from .torch_topk import logits_dtype
from .triton_chunked import Gradients, cut, gather_logprob_parts, row_chunks

LISTED_BLOCK = 128


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
    dtype, device = spec.compute_dtype, student_hidden.device
    w = student_weight.to(dtype)
    num_rows, vocab = student_hidden.shape[0], student_weight.shape[0]
    s_dtype = logits_dtype(spec)
    in_place = s_dtype == dtype
    bytes_per_logit = s_dtype.itemsize + (0 if in_place or not spec.any_grad else dtype.itemsize)
    entries = -(-teacher_ids.shape[1] * BYTES_PER_ENTRY // bytes_per_logit)
    shards = Shards(spec.group, vocab, device)
    chunks = row_chunks(num_rows, vocab + entries, bytes_per_logit, spec, shards)
    gradients = Gradients(spec, student_hidden, student_weight, student_bias, mask, shards, len(chunks))
    rows_of = Rows(spec, shards, num_rows, teacher_ids, teacher_logprobs, mask, row_weight, targets)
    with on(device):
        for rows in chunks:
            h = student_hidden[rows].to(dtype)
            s = matmul.logits(h, w, s_dtype)
            g = None
            if spec.any_grad:
                g = s if in_place else torch.empty(s.shape, dtype=dtype, device=device)
            rows_of.run(rows, s, student_bias, g, gradients.scale)
            del s
            if g is not None:
                gradients.take(rows, h, g, w)
                del g  # free it before allocating the next chunk's logits
    return RowResult(rows_of.value, rows_of.stats, *gradients.finish())


def topk_logits(
    spec: TopkSpec,
    student_logits: Tensor,  # [N, V]
    teacher_ids: Tensor,  # [N, K], -1: padding
    teacher_logprobs: Tensor,  # [N, K]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
    targets: Tensor | None,  # [N]
) -> RowResult:
    """Runs the same sweeps over copies of the caller's logits. The result's `hidden_grad` is their gradient."""
    (num_rows, vocab), device = student_logits.shape, student_logits.device
    grad = None
    if spec.any_grad:
        grad = torch.empty(student_logits.shape, dtype=gradient_dtype(student_logits.dtype), device=device)
    entries = -(-teacher_ids.shape[1] * BYTES_PER_ENTRY // student_logits.itemsize)
    shards = Shards(None, vocab, device)
    rows_of = Rows(spec, shards, num_rows, teacher_ids, teacher_logprobs, mask, row_weight, targets)
    with on(device):
        for rows in row_chunks(num_rows, vocab + entries, student_logits.itemsize, spec, shards):
            s = student_logits[rows].clone(memory_format=torch.contiguous_format)
            rows_of.run(rows, s, None, cut(grad, rows), 1.0)
    return RowResult(rows_of.value, rows_of.stats, grad, None, None)


class Rows:
    """Compares chunks of rows with the teacher, and collects each row's value and statistics."""

    def __init__(
        self, spec: TopkSpec, shards: Shards, num_rows: int, ids: Tensor, logprobs: Tensor, mask, row_weight, targets
    ):
        self.spec, self.shards, self.ids, self.logprobs = spec, shards, ids, logprobs
        self.mask, self.row_weight, self.targets = mask, row_weight, targets
        self.value = torch.zeros(num_rows, device=ids.device)
        self.stats = torch.zeros(len(TokenStats._fields), num_rows, device=ids.device) if spec.stats else None

    def run(self, rows: slice, s: Tensor, bias: Tensor | None, g: Tensor | None, grad_scale: float) -> None:
        """Overwrites the raw logits `s` `[R, V]`, and writes their gradient to `g` (may be `s`), if not None."""
        ids, log_p = self.ids[rows].long().contiguous(), self.logprobs[rows].double()
        mask, target = cut(self.mask, rows), cut(self.targets, rows)
        chunk = TopkChunk(self.spec, self.shards, s, bias, ids, mask, target)
        log_p = torch.where(chunk.there, log_p, -torch.inf)
        result = compare(self.spec, chunk.student, log_p)
        self.value[rows] = counted(result.value, mask).float()
        if self.stats is not None:
            found = statistics(self.spec, chunk.student, chunk.extremes(), result.raw, log_p, ids, target)
            self.stats[:, rows] = counted(found, mask).float()
        if g is not None:
            chunk.gradient(g, result.grad, result.grad_rest, cut(self.row_weight, rows), grad_scale)


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Returns `values` `[..., R]`, 0 in masked rows."""
    return values if mask is None else torch.where(mask, values, 0)


class TopkChunk:
    """Some rows' raw logits `[R, V]` in memory, -inf at the ids. See `torch_topk.TopkChunk`.

    Attributes:
        ids: `[R, K]` ids, numbered in this shard.
        there: `[R, K]` whether an entry is listed: its id is no padding and its row unmasked.
        listed: `[R, K]` float64 kept logits (see `Scaling`) at the ids, else -inf.
    """

    def __init__(
        self, spec: TopkSpec, shards: Shards, s: Tensor, bias: Tensor | None, ids: Tensor, mask, target: Tensor | None
    ):
        self.spec, self.shards, self.s, self.bias, self.mask, self.scaling = spec, shards, s, bias, mask, Scaling(spec)
        rows, self.vocab = s.shape
        self.there = ids >= 0 if mask is None else (ids >= 0) & mask[:, None]
        self.ids = ids = shards.local(ids)
        self.at_target = None
        if target is not None:  # before the ids are taken out
            column = shards.local(target)[:, None]
            clamped = self._clamped(column)
            at_target = self.scaling.student(self._kept(s.gather(1, clamped), clamped))
            self.at_target = self._of_all_shards(at_target, column == clamped)[:, 0]
        listed = torch.empty(ids.shape, dtype=s.dtype, device=s.device)
        self.config = tuning.row_config(s.device, shards.largest)
        self.splits = tuning.row_splits(rows, shards.largest, self.config.block, s.device)
        self.parts = torch.zeros(rows, self.splits, logprob_kernels.NUM_LOGPROB_PARTS.value, device=s.device)
        self.no_target = torch.full((rows,), -1, dtype=torch.int64, device=s.device)
        if rows:
            self._launch_first_sweep(listed)
        self.parts = gather_logprob_parts(shards, self.parts)
        clamped = self._clamped(ids)
        self.listed = self._of_all_shards(self._kept(listed, clamped), self.there & (ids == clamped))
        if shards.group is not None:
            self.listed = torch.where(self.there, self.listed, -torch.inf)
        self.student = Student(self.scaling.student(self.listed), self._log_sums().logsumexp(1))

    def _clamped(self, entries: Tensor) -> Tensor:
        return entries.clamp(0, self.vocab - 1)

    def _of_all_shards(self, values: Tensor, here: Tensor) -> Tensor:
        """Returns the `values` of the shard where `here` is true; `values` themselves if the head is not sharded."""
        if self.shards.group is None:
            return values
        (values,) = self.shards.sum(torch.where(here, values, 0.0))
        return values

    def _kept(self, z: Tensor, ids: Tensor) -> Tensor:
        return self.scaling.keep(z.double(), None if self.bias is None else self.bias[ids])

    def _launch_first_sweep(self, listed: Tensor) -> None:
        k = self.ids.shape[1]
        topk_kernels.take_listed[(len(self.s),)](
            self.s, self.ids, self.mask, listed, self.s.stride(0), k, self.vocab, BLOCK=LISTED_BLOCK
        )
        logprob_kernels.normalise_one[(len(self.s), self.splits)](
            self.s, self.bias, self.mask, self.no_target, self.parts, self.s.stride(0), self.vocab,
            1 / self.spec.temperature, self.spec.softcap, STATS=self.spec.stats, **self.config.constants,
        )  # fmt: skip

    def _part(self, position) -> Tensor:
        """Returns a partial result of every program, `[R, splits]`."""
        return self.parts[:, :, position.value].double()

    def _log_sums(self) -> Tensor:
        """Returns the log-sum-exp of each program's logits outside the ids, `[R, splits]`."""
        return self._part(logprob_kernels.PART_MAX) + self._part(logprob_kernels.PART_SUM).log()

    def extremes(self) -> Extremes:
        # sum_j w_j s_j = PART_MEAN + PART_SUM PART_SHIFT, with w_j = exp(s_j - PART_MAX)
        top, total = self._part(logprob_kernels.PART_MAX), self._part(logprob_kernels.PART_SUM)
        lse = self.student.lse
        weighted = self._part(logprob_kernels.PART_MEAN) + total * (
            self._part(logprob_kernels.PART_SHIFT) - lse[:, None]
        )
        entropy = -(torch.where(total > 0, weighted, 0.0) * (top - lse[:, None]).exp()).sum(1)
        return Extremes(entropy, top.amax(1), self.at_target)

    def gradient(self, g: Tensor, grad: Tensor, grad_rest: Tensor, weight: Tensor | None, scale: float) -> None:
        """Writes the gradient of the raw logits to `g` `[R, V]`: 0 in masked rows."""
        if not len(g):
            return
        spec = self.spec
        if weight is not None:
            grad, grad_rest = grad * weight.double()[:, None], grad_rest * weight.double()
        grad = grad * (scale / spec.temperature)
        if spec.softcap is not None:
            grad = grad * self.scaling.slope(self.listed)
        out = torch.empty(len(g), logprob_kernels.NUM_LOGPROB_OUT.value, device=g.device)
        logprob_kernels.finish_logprob[(len(g), self.splits)](
            self.s, g, self.bias, self.mask, self.no_target, grad_rest.neg().float(), self.parts, out,
            self.s.stride(0), g.stride(0), self.vocab, 1 / spec.temperature, spec.softcap, scale, GRAD=True,
            SPLITS=self.parts.shape[1], **self.config.constants,
        )  # fmt: skip
        topk_kernels.put_listed[(len(g),)](
            g, self.ids, self.mask, grad.float(), g.stride(0), self.ids.shape[1], self.vocab, BLOCK=LISTED_BLOCK
        )
