"""Backend "triton": the GPU default. It runs the vendor's GEMMs on chunks of tokens, and fused row kernels between.

Two GEMMs form a chunk's logits: S in `logits_dtype`, and D = (H_t - H_s) W^T in the compute dtype for a shared head,
else T. Two or three sweeps of `kernels/rows.py` read them and overwrite them with the gradient. Two more GEMMs
propagate it to hidden states and head. The kernels apply bias, softcap and temperatures, so D is a bare matmul.
Before D is rounded, the GEMM subtracts its value at a likely token of the row (`centre`). Masked rows go through the
GEMMs but not through the kernels. Nothing synchronises with the device: launches depend on shapes and options only,
so a CUDA graph can capture a call.

With `group=` the programs that share a row lie on several ranks. Between kernels, each rank gathers the partial results
of all programs; the next kernel merges them as it merges one GPU's. Only such a call synchronises, when it starts.

GEMM work is 3U with a frozen head and 4U with a trained one, U = 2 N H V. Total variation of 16-bit inputs with a
shared head takes one U more: u jumps at p = q, so H_t - H_s enters D as two rounded parts.

Memory is a chunk of logits plus outputs. A gradient narrower than D or T cannot overwrite them without a race, so it
gets its own buffer within the same budget.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import Tensor

from .. import planning
from ..divergences import DivergenceTerm
from ..kernels import bounded, terms
from ..kernels import logprobs as logprob_kernels
from ..kernels import rows as row_kernels
from ..shards import Shards
from ..spec import DivergenceSpec, LogprobSpec, RowResult, gradient_dtype
from ..stats import TokenStats
from . import matmul, tuning
from .elementwise import on

CENTRE_COLUMNS = 1024


def divergence_rows(
    spec: DivergenceSpec,
    student_hidden: Tensor,  # [N, H]
    student_weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor | None,  # [V, H_t]; None: the student's
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [V]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
    targets: Tensor | None,  # [N]
) -> RowResult:
    w_s = student_weight.to(spec.compute_dtype)
    teacher = Teacher(spec, student_hidden, w_s, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    return sweep_chunks(spec, teacher, student_hidden, student_weight, w_s, student_bias, mask, row_weight, targets)


def sweep_chunks(
    spec: DivergenceSpec, teacher, student_hidden, student_weight, w_s, student_bias, mask, row_weight, targets
) -> RowResult:
    """Runs all chunks. `teacher` makes the second tensor of logits, D or T, as `Teacher` does. `w_s` is the student's
    head in the compute dtype."""
    dtype, (num_rows, vocab) = spec.compute_dtype, (student_hidden.shape[0], student_weight.shape[0])
    in_place = teacher.o_dtype == dtype
    bytes_per_logit = teacher.s_dtype.itemsize + teacher.o_dtype.itemsize + teacher.mixing_bytes
    bytes_per_logit += 0 if in_place or not spec.any_grad else dtype.itemsize
    chunks = row_chunks(num_rows, vocab, bytes_per_logit, spec, teacher.shards)
    gradients = Gradients(spec, student_hidden, student_weight, student_bias, mask, teacher.shards, len(chunks))
    sweeps = Sweeps(spec, num_rows, vocab, teacher.is_delta, teacher.biases, teacher.shards)
    with on(student_hidden.device):
        for rows in chunks:
            h_s = student_hidden[rows].to(dtype)
            s = matmul.logits(h_s, w_s, teacher.s_dtype)
            o = teacher.logits(rows, s)
            g = None
            if spec.any_grad:
                g = o if in_place else torch.empty(o.shape, dtype=dtype, device=o.device)
            sweeps.run(s, o, g, rows, mask, row_weight, targets, gradients.scale)
            del s, o
            if g is not None:
                gradients.take(rows, h_s, g, w_s)
                del g  # free it before allocating the next chunk's logits
    return RowResult(sweeps.value, sweeps.stats, *gradients.finish())


class Teacher:
    """One teacher's logits, chunk by chunk: D = (H_t - H_s) W^T for a shared head, else T.

    Attributes:
        s_dtype, o_dtype: dtypes of S, and of D or T.
        is_delta: the kernels' IS_DELTA.
        biases: the kernels' pair.
        mixing_bytes: of further buffers, for each entry of a chunk.
        shards: the head's.
    """

    mixing_bytes = 0

    def __init__(self, spec: DivergenceSpec, h_s, w_s, h_t, w_t, bias_s, bias_t):
        shared = w_t is None
        self.spec, self.h_s, self.h_t, self.shared = spec, h_s, h_t, shared
        self.shards = Shards(spec.group, w_s.shape[0], h_s.device)
        self.w = w_s if shared else w_t.to(spec.compute_dtype)
        self.s_dtype, self.o_dtype = logit_dtypes(spec, shared)
        self.is_delta = delta_parts(spec, shared)
        self.biases = pair_of_biases(bias_s, bias_t, shared, w_s)

    def logits(self, rows: slice, s: Tensor) -> Tensor:
        """Returns D or T, `[R, V]`, beside the student's logits `s`."""
        if not self.shared:
            return matmul.logits(self.h_t[rows].to(self.spec.compute_dtype), self.w, self.o_dtype)
        wide = self.h_t[rows].float() - self.h_s[rows].float()
        return difference_logits(self.spec, wide, s, self.w, self.o_dtype, self.shards)


def divergence_logits(
    spec: DivergenceSpec,
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
) -> RowResult:
    """Runs the same sweeps over the caller's logits. The result's `hidden_grad` is the gradient of `student_logits`."""
    s, t = (z if z.stride(1) == 1 else z.contiguous() for z in (student_logits, teacher_logits))
    grad = torch.empty(s.shape, dtype=gradient_dtype(s.dtype), device=s.device) if spec.any_grad else None
    sweeps = Sweeps(spec, *s.shape, 0, (None, None), Shards(None, s.shape[1], s.device))
    with on(s.device):
        sweeps.run(s, t, grad, slice(0, s.shape[0]), mask, row_weight, targets, 1.0)
    return RowResult(sweeps.value, sweeps.stats, grad, None, None)


def logprob_rows(
    spec: LogprobSpec,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
) -> RowResult:
    dtype, device = spec.compute_dtype, hidden.device
    w = weight.to(dtype)
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    in_place = spec.logits_dtype == dtype
    bytes_per_logit = spec.logits_dtype.itemsize + (0 if in_place or not spec.any_grad else dtype.itemsize)
    shards = Shards(spec.group, vocab, device)
    targets = shards.local(targets)
    chunks = row_chunks(num_rows, vocab, bytes_per_logit, spec, shards)
    gradients = Gradients(spec, hidden, weight, bias, mask, shards, len(chunks))
    out = torch.zeros(num_rows, logprob_kernels.NUM_LOGPROB_OUT.value, device=device)
    config = tuning.row_config(device, shards.largest)
    inv_t = 1 / spec.temperature
    with on(device):
        for rows in chunks:
            h = hidden[rows].to(dtype)
            s = matmul.logits(h, w, spec.logits_dtype)
            g = s
            if spec.any_grad and not in_place:
                g = torch.empty(s.shape, dtype=dtype, device=device)
            splits = tuning.row_splits(len(s), shards.largest, config.block, device)
            parts = torch.empty(len(s), splits, logprob_kernels.NUM_LOGPROB_PARTS.value, device=device)
            common = config.constants
            logprob_kernels.normalise_one[(len(s), splits)](
                s, bias, cut(mask, rows), targets[rows], parts, s.stride(0), vocab, inv_t, spec.softcap,
                STATS=spec.stats, **common,
            )  # fmt: skip
            parts = gather_logprob_parts(shards, parts)
            logprob_kernels.finish_logprob[(len(s), splits)](
                s, g, bias, cut(mask, rows), targets[rows], cut(row_weight, rows), parts, out[rows], s.stride(0),
                g.stride(0), vocab, inv_t, spec.softcap, gradients.scale, GRAD=spec.any_grad,
                SPLITS=parts.shape[1], **common,
            )  # fmt: skip
            if spec.any_grad:
                gradients.take(rows, h, g, w)
            del s, g
    value, entropy, confidence = (
        out[:, column.value]
        for column in (logprob_kernels.OUT_LOGPROB, logprob_kernels.OUT_ENTROPY, logprob_kernels.OUT_CONFIDENCE)
    )
    stats = None
    if spec.stats:
        zero = torch.zeros_like(value)
        stats = torch.stack([zero, entropy, zero, value, zero, confidence, zero])
    return RowResult(value.contiguous(), stats, *gradients.finish())


def logit_dtypes(spec: DivergenceSpec, shared: bool) -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtypes of S, and of D (shared head) or T."""
    if not shared:
        # the loss depends on the difference of separately rounded logits
        exact = torch.float64 if spec.compute_dtype == spec.logits_dtype == torch.float32 else spec.logits_dtype
        return exact, exact
    # rounding D to 16 bits costs 0.3 % of a smooth gradient; if u jumps at p = q, it could flip the sign of u
    return spec.logits_dtype, spec.compute_dtype if spec.term.smooth else torch.float32


def difference_logits(
    spec: DivergenceSpec, wide: Tensor, s: Tensor, w: Tensor, o_dtype: torch.dtype, shards: Shards
) -> Tensor:
    """Returns `D = wide @ w.T`, `[R, V]`, from the fp32 difference of hidden states `wide` `[R, H]`.

    The difference is rounded once. Where u jumps at p = q, its remainder is multiplied too.
    """
    rounded = wide.to(spec.compute_dtype)
    # softcap is not a function of differences alone: it needs D without an offset
    centred = o_dtype.itemsize == 2 and spec.softcap is None
    o = matmul.logits(rounded, w, o_dtype, centre(s, rounded, w, shards) if centred else None)
    if delta_parts(spec, True) == 2:
        matmul.add_weight_grad(o, (wide - rounded.float()).to(rounded.dtype).T, w.T)
    return o


def delta_parts(spec: DivergenceSpec, shared: bool) -> int:
    """Returns the number of compute-dtype tensors that sum to H_t - H_s; 0 if T is computed, not D."""
    return shared * (1 if spec.term.smooth or spec.compute_dtype == torch.float32 else 2)


def centre(s: Tensor, h_o: Tensor, w: Tensor, shards: Shards) -> Tensor:
    """Returns the offset of each row of D, `[R]`: minus D's value at a likely token. A constant changes no softmax.
    D's rounding error is relative to D, so D should be small where q is large. The token is the most likely of the
    first CENTRE_COLUMNS entries (of each shard); the true maximum costs one more sweep over S and is no better. With
    the same roundings in float64 arithmetic on SmolLM2's states, the gradient's error is 0.33 to 0.45 % for mean KLs
    from 1e-4 to 0.9, and 0.35 to 0.50 % without an offset. So D needs no fp32 here at large KLs. The torch backend does
    switch to fp32, but reading the KL would synchronise with a GPU."""
    top = s[:, :CENTRE_COLUMNS].argmax(1)
    offset = torch.linalg.vecdot(h_o.float(), w[top].float()).neg_()
    if shards.group is not None:  # one constant for all shards
        _, offset = shards.select_at_global_argmax(s.gather(1, top[:, None])[:, 0].float(), offset)
    return offset


def row_chunks(num_rows: int, vocab: int, bytes_per_logit: int, spec, shards: Shards) -> list[slice]:
    memory = planning.gpu_memory(shards.device)
    budget = spec.chunk_bytes or planning.gpu_chunk_bytes(num_rows, vocab, bytes_per_logit, spec.weight_grad, memory)
    plan = planning.ChunkPlan.make(num_rows, vocab, bytes_per_logit, shards.device, budget)
    plan = replace(plan, rows=shards.all_reduce_min(plan.rows, shards.device))
    return list(plan.row_chunks(num_rows))


def gather_logprob_parts(shards: Shards, parts: Tensor) -> Tensor:
    """Returns the results of `normalise_one`, of the programs of all ranks."""
    return shards.gather_programs(parts, (logprob_kernels.PART_MAX.value,), row_kernels.LOWEST.value)


def pair_of_biases(bias_s: Tensor | None, bias_t: Tensor | None, shared: bool, like: Tensor):
    """Returns both models' biases `[V]`, or None twice if neither model has one. With a shared head, the teacher's bias
    defaults to the student's."""
    if bias_s is None and bias_t is None:
        return None, None
    zeros = like.new_zeros(like.shape[0]) if bias_s is None or bias_t is None else None
    bias_s = zeros if bias_s is None else bias_s
    return bias_s, bias_t if bias_t is not None else bias_s if shared else zeros


def cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Returns the `rows` of a per-row tensor, or None."""
    return None if tensor is None else tensor[rows]


def triton_term(term: DivergenceTerm):
    module, function = term.triton.split(":")
    return getattr(importlib.import_module(module), function)


def bounded_term(term: DivergenceTerm):
    """Returns the shorter form of a built-in divergence for rows of bounded differences; else the term itself."""
    module, function = term.triton.split(":")
    return getattr(bounded, function) if module == terms.__name__ else triton_term(term)


class Sweeps:
    """Launches the row kernels over a chunk and collects each row's value and statistics."""

    def __init__(self, spec: DivergenceSpec, num_rows: int, vocab: int, is_delta: int, biases, shards: Shards):
        self.spec, self.vocab, self.biases, self.shards = spec, vocab, biases, shards
        term, device = spec.term, shards.device
        clipped = spec.entry_clip is not None or spec.token_clip is not None
        self.one_pass = term.derivative_sum is not None and not clipped
        self.config = tuning.row_config(device, shards.largest)
        self.value = torch.zeros(num_rows, device=device)
        self.stats = torch.zeros(len(TokenStats._fields), num_rows, device=device) if spec.stats else None
        self.scalars = (1 / spec.temperature, 1 / spec.teacher_temperature, spec.softcap)
        self.clips = (spec.entry_clip, spec.token_clip, term.slope(spec.beta))
        self.flags = dict(IS_DELTA=is_delta, STATS=spec.stats)
        self.tile_flags = dict(TERM=triton_term(term), BETA=spec.beta, DERIVATIVE_SUM=term.derivative_sum)
        self.term_flags = dict(self.tile_flags, BOUNDED_TERM=bounded_term(term))

    def run(self, s, o, g, rows: slice, mask, row_weight, targets, grad_scale: float) -> None:
        """Computes value and statistics of the chunk's rows. Writes their gradient to `g` `[R, V]`, if not None."""
        num_rows = s.shape[0]
        if num_rows == 0:
            return
        splits = tuning.row_splits(num_rows, self.shards.largest, self.config.block, s.device)
        # the kernels do not write the entries of masked rows, nor of other ranks' programs
        new = torch.zeros if mask is not None or self.shards.group is not None else torch.empty
        parts = new(num_rows, splits, row_kernels.NUM_PARTS.value, device=s.device)
        mask_c, weight_c, target_c = (cut(x, rows) for x in (mask, row_weight, targets))
        if target_c is not None:
            target_c = self.shards.local(target_c)
        flags = self.flags | self.config.constants
        grid = (num_rows, splits)
        row_kernels.normalise[grid](
            s, o, *self.biases, mask_c, target_c, parts, s.stride(0), o.stride(0), self.vocab, *self.scalars, **flags
        )
        parts = self.gather(parts)
        sums = new(num_rows, parts.shape[1], row_kernels.NUM_SUMS.value, device=s.device)
        g_or_o = o if g is None else g
        for phase in ("sum",) if g is None else ("both",) if self.one_pass else ("sum", "grad"):
            row_kernels.accumulate[grid](
                s, o, g_or_o, *self.biases, mask_c, weight_c, parts, sums, s.stride(0), o.stride(0), g_or_o.stride(0),
                self.vocab, *self.scalars, *self.clips, grad_scale, PHASE=phase, SPLITS=parts.shape[1],
                **self.term_flags, **flags,
            )  # fmt: skip
            if phase != "grad":
                sums = self.shards.sum_programs(sums)
        self.collect(rows, sums, parts, mask_c, target_c)

    def gather(self, parts: Tensor) -> Tensor:
        """Returns the results of `normalise`, of the programs of all ranks."""
        k = row_kernels
        if self.spec.stats and self.shards.start:
            parts.view(torch.int32)[:, :, k.COLUMN_S.value : k.COLUMN_T.value + 1] += self.shards.start
        maxima = [position.value for position in (k.MAX_S, k.MAX_T, k.LARGEST_D, k.TOP_S, k.TOP_T)]
        return self.shards.gather_programs(parts, maxima, k.LOWEST.value)

    def collect(self, rows: slice, sums: Tensor, parts: Tensor, mask, targets) -> None:
        """Adds up the partial sums of each row's programs: `sums` and `parts` are `[R, splits, ...]`."""
        totals = sums.sum(1)
        value = totals[:, row_kernels.CLIPPED_LOSS.value]
        self.value[rows] = value if self.spec.token_clip is None else value.clamp_max(self.spec.token_clip)
        if self.spec.stats:
            row_stats = sums.new_zeros(len(sums), row_kernels.NUM_ROW_STATS.value)
            row_kernels.finish_stats[(len(sums),)](parts, mask, targets, row_stats, SPLITS=parts.shape[1])
            k = row_kernels
            columns = [totals[:, i.value] for i in (k.LOSS, k.ENTROPY_S, k.ENTROPY_T)]
            columns += [row_stats[:, i.value] for i in (k.LOGPROB_S, k.LOGPROB_T, k.CONFIDENCE, k.AGREE)]
            self.stats[:, rows] = torch.stack(columns)


class Gradients:
    """Propagates gradients of chunks to hidden states, head and bias. Several chunks accumulate the head's in fp32."""

    def __init__(
        self,
        spec,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        shards: Shards,
        chunks: int,
    ):
        self.hidden, self.weight, self.bias, self.mask, self.shards = hidden, weight, bias, mask, shards
        # entries of q - p as small as 1e-6 carry the gradient's direction, and fp16 underflows there
        self.scale = 1024.0 if spec.compute_dtype == torch.float16 else 1.0
        self.hidden_grad = torch.empty_like(hidden, dtype=gradient_dtype(hidden.dtype)) if spec.hidden_grad else None
        fp32 = dict(dtype=torch.float32, device=hidden.device)
        # the GEMM rounds a single product once; a sum of several is rounded when it is complete
        once = chunks == 1 and self.scale == 1 and spec.compute_dtype == weight.dtype
        head = fp32 | (dict(dtype=weight.dtype) if once else {})
        # the first chunk overwrites the buffer; without rows there is no first chunk
        new = torch.empty if len(hidden) else torch.zeros
        self.weight_grad = new(weight.shape, **head) if spec.weight_grad else None
        self.bias_grad = torch.zeros(weight.shape[0], **fp32) if spec.bias_grad else None

    def take(self, rows: slice, h: Tensor, g: Tensor, w: Tensor) -> None:
        if self.hidden_grad is not None:
            # shards' products are larger than their sum, which is rounded once
            grad = matmul.hidden_grad(g, w, None if self.shards.group is None else torch.float32)
            (grad,) = self.shards.sum(grad)
            self.hidden_grad[rows] = grad if self.scale == 1 else grad.float() / self.scale
        if self.weight_grad is not None:
            if self.mask is not None:
                h = torch.where(self.mask[rows, None], h, 0)  # a masked row may contain NaN
            matmul.add_weight_grad(self.weight_grad, g, h, overwrite=rows.start == 0)
        if self.bias_grad is not None:
            self.bias_grad += g.sum(0, dtype=torch.float32)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        def finished(grad, like):
            return (
                None
                if grad is None
                else (grad if self.scale == 1 else grad.div_(self.scale)).to(gradient_dtype(like.dtype))
            )

        return self.hidden_grad, finished(self.weight_grad, self.weight), finished(self.bias_grad, self.bias)
