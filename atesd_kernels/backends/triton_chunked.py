"""Backend "triton": the GPU default. Chunks of tokens, the vendor's GEMMs, fused row kernels between them.

A chunk's logits are formed by two GEMMs (S in `logits_dtype`; with a shared head D = (H_t - H_s) W^T in the compute
dtype, else T), read by two or three sweeps of `kernels/rows.py`, and overwritten by the gradient, which two more
GEMMs carry to hidden states and head. Bias, softcap and temperatures are applied inside the kernels, so D stays a
plain product. Nothing here waits for the device: shapes and options alone decide what is launched, and a call can be
captured in a CUDA graph. Masked rows go through the GEMMs but not through the kernels. Before D is rounded, the GEMM
subtracts its value at a likely token of the row (`centre`).

GEMM work is 3U with a frozen head and 4U with a trained one, U = 2 N H V. Total variation of 16-bit inputs with a
shared head takes one U more: u jumps at p = q, so H_t - H_s enters D as two rounded parts.

Memory is a chunk of logits plus outputs. Where the gradient is narrower than D or T it cannot overwrite them without
a race, and gets a buffer of its own within the same budget.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import planning
from ..divergences import DivergenceTerm
from ..kernels import bounded, terms
from ..kernels import logprobs as logprob_kernels
from ..kernels import rows as row_kernels
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
    dtype, shared = spec.compute_dtype, teacher_weight is None
    w_s = student_weight.to(dtype)
    w_t = w_s if shared else teacher_weight.to(dtype)
    s_dtype, o_dtype = logit_dtypes(spec, shared)
    in_place = o_dtype == dtype
    # a softcap is no function of differences alone: it needs D itself
    centred = shared and o_dtype.itemsize == 2 and spec.softcap is None
    num_rows, vocab = student_hidden.shape[0], student_weight.shape[0]
    bytes_per_logit = s_dtype.itemsize + o_dtype.itemsize + (0 if in_place or not spec.any_grad else dtype.itemsize)
    chunks = row_chunks(num_rows, vocab, bytes_per_logit, spec, student_hidden.device)
    gradients = Gradients(spec, student_hidden, student_weight, student_bias, mask, len(chunks))
    sweeps = Sweeps(
        spec,
        num_rows,
        vocab,
        delta_parts(spec, shared),
        pair_of_biases(student_bias, teacher_bias, shared, w_s),
        w_s.device,
    )
    with on(student_hidden.device):
        for rows in chunks:
            h_s = student_hidden[rows].to(dtype)
            s = matmul.logits(h_s, w_s, s_dtype)
            h_o, rest = teacher_operand(spec, shared, student_hidden[rows], teacher_hidden[rows])
            o = matmul.logits(h_o, w_t, o_dtype, centre(s, h_o, w_t) if centred else None)
            if rest is not None:
                matmul.add_weight_grad(o, rest.T, w_t.T)
            g = None
            if spec.any_grad:
                g = o if in_place else torch.empty(o.shape, dtype=dtype, device=o.device)
            sweeps.run(s, o, g, rows, mask, row_weight, targets, gradients.scale)
            del s, o
            if g is not None:
                gradients.take(rows, h_s, g, w_s)
                del g  # before the next chunk's logits are made
    return RowResult(sweeps.value, sweeps.stats, *gradients.finish())


def divergence_logits(
    spec: DivergenceSpec,
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
) -> RowResult:
    """The same sweeps over logits the caller holds; `hidden_grad` is then the gradient of `student_logits`."""
    s, t = (z if z.stride(1) == 1 else z.contiguous() for z in (student_logits, teacher_logits))
    grad = torch.empty(s.shape, dtype=gradient_dtype(s.dtype), device=s.device) if spec.any_grad else None
    sweeps = Sweeps(spec, *s.shape, 0, (None, None), s.device)
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
    chunks = row_chunks(num_rows, vocab, bytes_per_logit, spec, device)
    gradients = Gradients(spec, hidden, weight, bias, mask, len(chunks))
    out = torch.zeros(num_rows, logprob_kernels.NUM_LOGPROB_OUT.value, device=device)
    config = tuning.row_config(device, vocab)
    inv_t = 1 / spec.temperature
    with on(device):
        for rows in chunks:
            h = hidden[rows].to(dtype)
            s = matmul.logits(h, w, spec.logits_dtype)
            g = s
            if spec.any_grad and not in_place:
                g = torch.empty(s.shape, dtype=dtype, device=device)
            splits = tuning.row_splits(len(s), vocab, config.block, device)
            parts = torch.empty(len(s), splits, logprob_kernels.NUM_LOGPROB_PARTS.value, device=device)
            common = config.constants
            logprob_kernels.normalise_one[(len(s), splits)](
                s, bias, cut(mask, rows), targets[rows], parts, s.stride(0), vocab, inv_t, spec.softcap,
                STATS=spec.stats, **common,
            )  # fmt: skip
            logprob_kernels.finish_logprob[(len(s), splits)](
                s, g, bias, cut(mask, rows), targets[rows], cut(row_weight, rows), parts, out[rows], s.stride(0),
                g.stride(0), vocab, inv_t, spec.softcap, gradients.scale, GRAD=spec.any_grad, SPLITS=splits, **common,
            )  # fmt: skip
            if spec.any_grad:
                gradients.take(rows, h, g, w)
            del s, g
    value, entropy, confidence, _ = out.unbind(1)
    stats = None
    if spec.stats:
        zero = torch.zeros_like(value)
        stats = torch.stack([zero, entropy, zero, value, zero, confidence, zero])
    return RowResult(value.contiguous(), stats, *gradients.finish())


def logit_dtypes(spec: DivergenceSpec, shared: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of S, and of D (shared head) or T."""
    if not shared:
        # the difference of separately rounded logits is what the loss is made of
        exact = torch.float64 if spec.compute_dtype == spec.logits_dtype == torch.float32 else spec.logits_dtype
        return exact, exact
    # D rounded to 16 bits costs 0.3 % of a smooth gradient; where u jumps at p = q it would cost its sign
    return spec.logits_dtype, spec.compute_dtype if spec.term.smooth else torch.float32


def teacher_operand(spec: DivergenceSpec, shared: bool, h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the head is multiplied by for D or T; and the rest of it, where rounding would cost u its sign."""
    if not shared:
        return h_t.to(spec.compute_dtype), None
    wide = h_t.float() - h_s.float()
    rounded = wide.to(spec.compute_dtype)
    return rounded, (wide - rounded.float()).to(rounded.dtype) if delta_parts(spec, shared) == 2 else None


def delta_parts(spec: DivergenceSpec, shared: bool) -> int:
    """Of how many tensors in the compute dtype H_t - H_s is the sum; 0 where T is computed instead of D."""
    return shared * (1 if spec.term.smooth or spec.compute_dtype == torch.float32 else 2)


def centre(s: Tensor, h_o: Tensor, w: Tensor) -> Tensor:
    """What to add to each row of D `[R]`, so that it is small where q is large: a constant changes no softmax, but
    D is rounded relative to its size. The likely token is looked for among CENTRE_COLUMNS entries only: the row's
    true maximum would cost one more sweep over S and is no better. With the same roundings in float64 arithmetic on
    SmolLM2's states, the gradient's error is 0.33 to 0.45 % for mean KLs from 1e-4 to 0.9, and 0.35 to 0.50 %
    without a centre: unlike the torch backend, whose look at the KL a GPU would have to wait for, D needs no fp32
    there."""
    top = s[:, :CENTRE_COLUMNS].argmax(1)
    return torch.linalg.vecdot(h_o.float(), w[top].float()).neg_()


def row_chunks(num_rows: int, vocab: int, bytes_per_logit: int, spec, device) -> list[slice]:
    memory = planning.gpu_memory(device)
    budget = spec.chunk_bytes or planning.gpu_chunk_bytes(num_rows, vocab, bytes_per_logit, spec.weight_grad, memory)
    plan = planning.ChunkPlan.make(num_rows, vocab, bytes_per_logit, device, budget)
    return list(plan.row_chunks(num_rows))


def pair_of_biases(bias_s: Tensor | None, bias_t: Tensor | None, shared: bool, like: Tensor):
    """Both models' biases, None and None if there is none. The shared head's is the teacher's too unless it has its
    own."""
    if bias_s is None and bias_t is None:
        return None, None
    zeros = like.new_zeros(like.shape[0]) if bias_s is None or bias_t is None else None
    bias_s = zeros if bias_s is None else bias_s
    return bias_s, bias_t if bias_t is not None else bias_s if shared else zeros


def cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """A chunk of a per-row tensor."""
    return None if tensor is None else tensor[rows]


def triton_term(term: DivergenceTerm):
    module, function = term.triton.split(":")
    return getattr(importlib.import_module(module), function)


def bounded_term(term: DivergenceTerm):
    """The shorter form for rows of bounded differences, which the built-in divergences have."""
    module, function = term.triton.split(":")
    return getattr(bounded, function) if module == terms.__name__ else triton_term(term)


class Sweeps:
    """Launches the row kernels over a chunk and collects each row's value and statistics."""

    def __init__(self, spec: DivergenceSpec, num_rows: int, vocab: int, is_delta: int, biases, device: torch.device):
        self.spec, self.vocab, self.biases = spec, vocab, biases
        term = spec.term
        self.known_sum = {"forward_kl": "zero", "reverse_kl": "mean", "jeffreys": "mean"}.get(term.name)
        clipped = spec.entry_clip is not None or spec.token_clip is not None
        self.one_pass = self.known_sum is not None and not clipped
        self.config = tuning.row_config(device, vocab)
        self.value = torch.zeros(num_rows, device=device)
        self.stats = torch.zeros(len(TokenStats._fields), num_rows, device=device) if spec.stats else None
        self.scalars = (1 / spec.temperature, 1 / spec.teacher_temperature, spec.softcap)
        self.clips = (spec.entry_clip, spec.token_clip, term.slope(spec.beta))
        self.flags = dict(IS_DELTA=is_delta, STATS=spec.stats)
        self.tile_flags = dict(TERM=triton_term(term), BETA=spec.beta, SUM_U=self.known_sum or "sum")
        self.term_flags = dict(self.tile_flags, BOUNDED_TERM=bounded_term(term))

    def run(self, s, o, g, rows: slice, mask, row_weight, targets, grad_scale: float) -> None:
        """Value, statistics and, into `g` `[R, V]`, the gradient of the chunk's rows."""
        num_rows = s.shape[0]
        if num_rows == 0:
            return
        splits = tuning.row_splits(num_rows, self.vocab, self.config.block, s.device)
        # masked rows leave theirs untouched
        new = torch.zeros if mask is not None else torch.empty
        parts = new(num_rows, splits, row_kernels.NUM_PARTS.value, device=s.device)
        sums = new(num_rows, splits, row_kernels.NUM_SUMS.value, device=s.device)
        mask_c, weight_c, target_c = (cut(x, rows) for x in (mask, row_weight, targets))
        flags = self.flags | self.config.constants
        grid = (num_rows, splits)
        row_kernels.normalise[grid](
            s, o, *self.biases, mask_c, target_c, parts, s.stride(0), o.stride(0), self.vocab, *self.scalars, **flags
        )
        g_or_o = o if g is None else g
        for phase in ("sum",) if g is None else ("both",) if self.one_pass else ("sum", "grad"):
            row_kernels.accumulate[grid](
                s, o, g_or_o, *self.biases, mask_c, weight_c, parts, sums, s.stride(0), o.stride(0), g_or_o.stride(0),
                self.vocab, *self.scalars, *self.clips, grad_scale, PHASE=phase, SPLITS=splits, **self.term_flags,
                **flags,
            )  # fmt: skip
        self.collect(rows, sums, parts, mask_c, target_c)

    def collect(self, rows: slice, sums: Tensor, parts: Tensor, mask, targets) -> None:
        """Add up what the programs of each row left: `sums` and `parts` are `[R, splits, ...]`."""
        totals = sums.sum(1)
        value = totals[:, 1]
        self.value[rows] = value if self.spec.token_clip is None else value.clamp_max(self.spec.token_clip)
        if self.spec.stats:
            row_stats = sums.new_zeros(len(sums), row_kernels.NUM_ROW_STATS.value)
            row_kernels.settle[(len(sums),)](parts, mask, targets, row_stats, SPLITS=parts.shape[1])
            confidence, agree, logprob_s, logprob_t = row_stats.unbind(1)
            self.stats[:, rows] = torch.stack(
                [totals[:, 0], totals[:, 4], totals[:, 5], logprob_s, logprob_t, confidence, agree]
            )


class Gradients:
    """Carries a chunk's gradient to hidden states, head and bias; the head's in fp32 if there are several chunks."""

    def __init__(self, spec, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, chunks: int = 0):
        self.hidden, self.weight, self.bias, self.mask = hidden, weight, bias, mask
        # entries of q - p as small as 1e-6 carry the gradient's direction; fp16 ends there
        self.scale = 1024.0 if spec.compute_dtype == torch.float16 else 1.0
        self.hidden_grad = torch.empty_like(hidden, dtype=gradient_dtype(hidden.dtype)) if spec.hidden_grad else None
        fp32 = dict(dtype=torch.float32, device=hidden.device)
        # one product is rounded once, by the GEMM; a sum of several when it is complete
        once = chunks == 1 and self.scale == 1 and spec.compute_dtype == weight.dtype
        head = fp32 | (dict(dtype=weight.dtype) if once else {})
        # the first chunk overwrites it; without a row there is none
        new = torch.empty if len(hidden) else torch.zeros
        self.weight_grad = new(weight.shape, **head) if spec.weight_grad else None
        self.bias_grad = torch.zeros(weight.shape[0], **fp32) if spec.bias_grad else None

    def take(self, rows: slice, h: Tensor, g: Tensor, w: Tensor) -> None:
        if self.hidden_grad is not None:
            grad = matmul.hidden_grad(g, w)
            self.hidden_grad[rows] = grad if self.scale == 1 else grad.float() / self.scale
        if self.weight_grad is not None:
            if self.mask is not None:
                h = torch.where(self.mask[rows, None], h, 0)  # whatever a masked row holds, NaN included
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
