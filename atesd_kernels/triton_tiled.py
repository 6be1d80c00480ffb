"""Backend "triton_tiled": logits never leave the chip. For loss-only work (probes, evaluation) and tight memory.

A first pass over the vocabulary computes both models' logits tile by tile and keeps running statistics; a second
recomputes the tiles for the divergence, whose terms need the normalisers. Gradients leave the second pass in blocks of
columns, as wide as the byte budget allows, which the vendor's GEMMs carry to hidden states and head at once: a head's
gradient is complete after its block. Where a sum over the row must precede the gradient (all but unclipped KLs), that
sum is a pass of its own.

GEMM work in units of U = 2 N H V: 2 for the statistics, 2 for each further pass, 1 for each gradient. The chunked
backend needs 3 or 4 in all: this one trades time for memory. Rows that do not count are in no tile: no product, no
copy. Partial sums are merged in a fixed order; there are no atomics.

fp32 inputs with separate heads go to the chunked backend, whose fp64 logits their difference needs.

`grad_filter=eps` skips a tile's products in the pass that writes the gradient if neither model gives any of its tokens
a probability above eps; the first pass keeps the maxima that say so. An entry of a KL's gradient by the logits is q - p
(forward) or at most eps times a logarithm, so no skipped entry of the forward KL's exceeds eps. Where loss and gradient
are one pass (unclipped KLs), the loss leaves out these tiles' terms too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import autotune, matmul, planning, triton_chunked, tuning
from .kernels import logprobs as logprob_kernels
from .kernels import rows as row_kernels
from .kernels import tiles as tile_kernels
from .spec import DivergenceSpec, LogprobSpec, RowResult
from .stats import TokenStats
from .triton_chunked import Gradients, Sweeps, delta_parts, divergence_logits, on, pair_of_biases
from .tuning import TileConfig

__all__ = ["divergence_logits", "divergence_rows", "exposure_means", "logprob_rows"]


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
    dtype, shared = spec.compute_dtype, teacher_weight is None
    arguments = (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    if dtype == torch.float32 and not shared:
        if spec.grad_filter is not None:
            raise ValueError("grad_filter cannot be used with fp32 inputs and separate heads, whose logits are fp64.")
        return triton_chunked.divergence_rows(spec, *arguments, mask, row_weight, targets)
    h_s, w_s, h_t = (rows_of(x.to(dtype)) for x in arguments[:3])
    w_t = w_s if shared else rows_of(teacher_weight.to(dtype))
    (num_rows, hidden), vocab, device = h_s.shape, w_s.shape[0], h_s.device
    biases = pair_of_biases(student_bias, teacher_bias, shared, w_s)
    gradients = Gradients(spec, student_hidden, student_weight, student_bias, mask)
    sweeps = Sweeps(spec, num_rows, vocab, delta_parts(spec, shared), biases, device)
    if num_rows == 0:
        return RowResult(sweeps.value, sweeps.stats, *zeroed(gradients).finish())
    row, count = counted_rows(mask, num_rows, device)
    filtered = spec.grad_filter is not None and spec.any_grad
    one_pass = sweeps.one_pass and spec.any_grad
    flags = dict(sweeps.flags, PRECISION="ieee")

    def normalise(config: TileConfig) -> tuple[Tensor, Tensor | None]:
        """First pass: the rows' partial sums `[N, splits, ...]`, and the tiles' maxima for a filter."""
        splits = tuning.tile_splits(num_rows, vocab, config, device)
        parts = torch.zeros(num_rows, splits, row_kernels.NUM_PARTS.value, device=device)
        tops = None
        if filtered:
            tops = torch.zeros(-(-num_rows // config.block_m), -(-vocab // config.block_n), device=device)
        heads, strides = head_operands((w_s, w_t), config)
        tile_kernels.tile_normalise[(-(-num_rows // config.block_m), splits)](
            h_s, h_t, *heads, *biases, row, count, targets, parts, tops, h_s.stride(0), h_t.stride(0),
            *strides, vocab, hidden, h_t.shape[1],
            *sweeps.scalars, **flags, **config.constants,
        )  # fmt: skip
        return parts, tops

    def accumulate(config: TileConfig, phase: str, g: Tensor, cols: slice, programs: int, sum_place: int = 0) -> None:
        top = None if phase == "sum" else tops
        heads, strides = head_operands((w_s, w_t), config)
        tile_kernels.tile_accumulate[(-(-num_rows // config.block_m), programs)](
            h_s, h_t, *heads, g, *biases, row, count, row_weight, parts, sums, top, h_s.stride(0), h_t.stride(0),
            *strides, g.stride(0),
            0 if top is None else top.stride(0), cols.start, sum_place, cols.stop, hidden, h_t.shape[1],
            *sweeps.scalars, *sweeps.clips, gradients.scale, spec.grad_filter, first.block_m, first.block_n,
            PHASE=phase, SPLITS=parts.shape[1], SUM_SPLITS=sums.shape[1], **sweeps.tile_flags, **flags,
            **config.constants,
        )  # fmt: skip

    # a filter's second pass works on tiles that the first pass's contain: those of the table
    call = TunedCall(device, dtype, hidden, vocab, "shared" if shared else "separate", tuned=not filtered)
    with on(device):
        first = call.tile_config("tile_normalise", tuning.TILES, normalise)
        parts, tops = normalise(first)
        if tops is not None:
            tighten(tops, parts, row, count, first)
        sums = torch.zeros(num_rows, parts.shape[1], row_kernels.NUM_SUMS.value, device=device)
        config = call.tile_config(
            "tile_accumulate", tuning.SECOND_PASS_TILES,
            lambda c: accumulate(c, "sum", parts, slice(0, vocab), parts.shape[1]),
        )  # fmt: skip
        blocks = column_blocks(spec, num_rows, vocab, dtype, config, device)
        block_splits = tuning.tile_splits(num_rows, blocks[0].stop, config, device) if blocks else 1
        if one_pass:
            sum_splits = 1 << (len(blocks) * block_splits - 1).bit_length()
            sums = torch.zeros(num_rows, sum_splits, row_kernels.NUM_SUMS.value, device=device)
        else:
            accumulate(config, "sum", parts, slice(0, vocab), parts.shape[1])
        if spec.any_grad:
            carrier = ColumnGradients(gradients, h_s, w_s, mask, whole=mask is None and tops is None)
            for i, cols in enumerate(blocks):
                g = carrier.buffer(cols)
                accumulate(config, "both" if one_pass else "grad", g, cols, block_splits, i * block_splits)
                carrier.take(cols, g)
            carrier.finish()
        sweeps.collect(slice(0, num_rows), sums, parts, mask, targets)
    return RowResult(sweeps.value, sweeps.stats, *gradients.finish())


def logprob_rows(
    spec: LogprobSpec,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
) -> RowResult:
    gradients = Gradients(spec, hidden, weight, bias, mask)
    out, launch = scores(spec, hidden, weight, bias, targets, mask)
    value, entropy, confidence, _ = out.unbind(1)
    stats = None
    if spec.stats:
        stats = torch.zeros(len(TokenStats._fields), len(value), device=value.device)
        stats[1], stats[3], stats[5] = entropy, value, confidence
    if not spec.any_grad or not len(value):
        return RowResult(value.contiguous(), stats, *zeroed(gradients).finish())
    dtype = spec.compute_dtype
    w = weight.to(dtype)
    carrier = ColumnGradients(gradients, hidden.to(dtype), w, mask, whole=mask is None)
    with on(hidden.device):
        for cols in column_blocks(spec, len(value), len(w), dtype, launch.args[0], hidden.device):
            g = carrier.buffer(cols)
            launch(g, cols, row_weight, gradients.scale)
            carrier.take(cols, g)
    carrier.finish()
    return RowResult(value.contiguous(), stats, *gradients.finish())


def exposure_means(
    spec: LogprobSpec,
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [B, T]
    lengths: Tensor,  # [B]
    exposed: Tensor,  # [B]
    mask: Tensor,  # [B, T] bool: exposed <= i < length
) -> Tensor:
    """Mean log-probability of each sequence's tokens after its exposed prefix, `[B]`; no gradient."""
    num_sequences, length = targets.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    out, _ = scores(spec, flat, weight, bias, targets.reshape(-1), mask.reshape(-1))
    means = torch.zeros(num_sequences, device=hidden.device)
    if num_sequences and length:
        with on(hidden.device):
            logprob_kernels.span_mean[(num_sequences,)](out, lengths, exposed, means, length, BLOCK=1024)
    return means


def scores(spec: LogprobSpec, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask):
    """Per row log-probability, entropy, confidence and lse, `[N, 4]`; and the launcher of a gradient."""
    dtype, device = spec.compute_dtype, hidden.device
    h, w = rows_of(hidden.to(dtype)), rows_of(weight.to(dtype))
    (num_rows, size), vocab = h.shape, w.shape[0]
    out = torch.zeros(num_rows, logprob_kernels.NUM_LOGPROB_OUT.value, device=device)
    if num_rows == 0:
        return out, None
    row, count = counted_rows(mask, num_rows, device)
    inv_t = 1 / spec.temperature

    def launch(config: TileConfig, g: Tensor, cols: slice, row_weight: Tensor | None, scale: float, grad=True) -> None:
        programs = tuning.tile_splits(num_rows, cols.stop - cols.start, config, device)
        (head,), (stride,) = head_operands((w,), config)
        tile_kernels.tile_scores[(-(-num_rows // config.block_m), programs)](
            h, head, bias, row, count, targets, g, g, row_weight, out, h.stride(0), stride, g.stride(0),
            cols.start, cols.stop, size, inv_t, spec.softcap, scale, GRAD=grad, PRECISION="ieee", **config.constants,
        )  # fmt: skip

    def normalise(config: TileConfig) -> Tensor:
        """The rows' partial sums `[N, splits, ...]`."""
        splits = tuning.tile_splits(num_rows, vocab, config, device)
        parts = torch.zeros(num_rows, splits, logprob_kernels.NUM_LOGPROB_PARTS.value, device=device)
        launch(config, parts, slice(0, vocab), None, 1.0, grad=False)
        return parts

    with on(device):
        call = TunedCall(device, dtype, size, vocab, "one model")
        config = call.tile_config("tile_scores", tuning.ONE_MODEL_TILES, normalise)
        parts = normalise(config)
        logprob_kernels.finish_logprob[(num_rows, 1)](
            h, h, bias, mask, targets, None, parts, out, 0, 0, vocab, inv_t, spec.softcap, 1.0, GRAD=False,
            SPLITS=parts.shape[1], BLOCK=1024,
        )  # fmt: skip
    return out, functools.partial(launch, config)


class TunedCall:
    """Chooses the tile sizes of a call: the table's, or under `ATESD_AUTOTUNE=1` the fastest of a few."""

    def __init__(self, device, dtype: torch.dtype, hidden: int, vocab: int, heads: str, tuned: bool = True):
        self.device, self.dtype, self.arch = device, dtype, tuning.architecture(device)
        self.key = f"{self.arch} {dtype} H={hidden} V={vocab} {heads}"
        self.operands = 1 if heads == "one model" else 2  # blocks of rows that a step over the hidden size holds
        self.tuned = tuned and autotune.enabled() and self.arch is not None

    def tile_config(self, kernel: str, table: dict[str, TileConfig], launch: Callable[[TileConfig], None]):
        default = tuning.tile_config(self.device, self.dtype, table)
        if not self.tuned:
            return default
        configs = autotune.candidates(default, self.arch, self.dtype.itemsize, self.operands)
        return autotune.fastest(f"{kernel} {self.key}", configs, launch)


def rows_of(x: Tensor) -> Tensor:
    """Rows may lie anywhere, entries of a row side by side: anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def head_operands(heads: tuple[Tensor, ...], config: TileConfig) -> tuple[tuple, tuple[int | None, ...]]:
    """The heads `[V, H]` as a kernel takes them, with their strides; for TMA, descriptors without strides."""
    aligned = all((w.stride(0) * w.itemsize) % 16 == 0 and w.data_ptr() % 16 == 0 for w in heads)
    if not (config.tma and aligned):
        return heads, tuple(w.stride(0) for w in heads)
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [config.block_n, config.block_k]
    return tuple(TensorDescriptor.from_tensor(w, block) for w in heads), (None,) * len(heads)


def counted_rows(mask: Tensor | None, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that count, first in the list `[N]`, and how many they are, `[1]`; made without asking the device."""
    if mask is None:
        return (
            torch.arange(num_rows, dtype=torch.int32, device=device),
            torch.full((1,), num_rows, dtype=torch.int32, device=device),
        )
    order = torch.argsort(mask.to(torch.uint8), descending=True, stable=True)
    return order.to(torch.int32), mask.sum(dtype=torch.int32).reshape(1)


def tighten(tops: Tensor, parts: Tensor, row: Tensor, count: Tensor, config: TileConfig) -> None:
    """Make the first pass's `tops` `[row tiles, column tiles]`, relative to the columns of one program, relative to all
    columns, by the most that the program's columns hold of a row's distributions. `parts` is `[N, splits, ...]`."""
    lse = parts[..., 0:8:4] + parts[..., 1:8:4].log()  # of both models
    share = (lse - lse.logsumexp(1, keepdim=True)).exp().amax(2)[row.long()]
    counted = torch.arange(len(row), device=row.device)[:, None] < count
    share = torch.nn.functional.pad(torch.where(counted, share, 0.0), (0, 0, 0, -len(row) % config.block_m))
    share = share.view(len(tops), config.block_m, -1).amax(1)
    tops *= share.repeat_interleave(-(-tops.shape[1] // share.shape[1]), 1)[:, : tops.shape[1]]


def column_blocks(spec, num_rows: int, vocab: int, dtype: torch.dtype, config, device) -> list[slice]:
    """Columns whose gradient fits the byte budget."""
    if not spec.any_grad:
        return []
    budget = spec.chunk_bytes or planning.default_chunk_bytes(device)
    columns = max(1, budget // (num_rows * dtype.itemsize) // config.block_n) * config.block_n
    return [slice(j, min(j + columns, vocab)) for j in range(0, vocab, columns)]


def zeroed(gradients: Gradients) -> Gradients:
    if gradients.hidden_grad is not None:
        gradients.hidden_grad.zero_()
    return gradients


class ColumnGradients:
    """`triton_chunked.Gradients`, fed by blocks of columns instead of rows."""

    def __init__(self, gradients: Gradients, h: Tensor, w: Tensor, mask: Tensor | None, whole: bool):
        self.gradients, self.h, self.w, self.whole = gradients, h, w, whole
        if mask is not None and gradients.weight_grad is not None:
            self.h = torch.where(mask[:, None], h, 0)  # whatever a masked row holds, NaN included
        wanted = gradients.hidden_grad is not None
        self.hidden_grad = torch.zeros(h.shape, dtype=torch.float32, device=h.device) if wanted else None

    def buffer(self, cols: slice) -> Tensor:
        # the kernels do not write the rows of masked tokens, nor filtered tiles
        new = torch.empty if self.whole else torch.zeros
        return new(len(self.h), cols.stop - cols.start, dtype=self.w.dtype, device=self.w.device)

    def take(self, cols: slice, g: Tensor) -> None:
        if self.hidden_grad is not None:
            matmul.add_weight_grad(self.hidden_grad, g.T, self.w[cols])
        if self.gradients.weight_grad is not None:
            matmul.add_weight_grad(self.gradients.weight_grad[cols], g, self.h, overwrite=True)
        if self.gradients.bias_grad is not None:
            self.gradients.bias_grad[cols] = g.sum(0, dtype=torch.float32)

    def finish(self) -> None:
        if self.hidden_grad is not None:
            self.gradients.hidden_grad.copy_(self.hidden_grad / self.gradients.scale)
