"""Backend "torch": any device, the CPU default. Also the readable form of what the Triton backends do.

A chunk of rows is computed block of the vocabulary by block: student logits S and either the logit difference
D = T - S (shared head, formed from the difference of the hidden states) or the teacher's logits T. Sweeps over the
chunk then find the normalisers, sum the divergence, and overwrite the teacher's block with the gradient

    dD/ds_j = 1_A[j] u'_j - q_j sum_A u' + k q_j (1_notA[j] - sum_notA q),      A = entries not clipped,

which without a clip is `u'_j - q_j sum u'`. The elementwise passes run over tiles small enough for the processor's
cache: that is what makes them cheap (bench/chunk_size.py), and eager code pays no wait for a compiler.

Where teacher and student are near (every |d| <= NEAR), terms are taken from x = d - c, c = lse_t - lse_s, with c from
`mean d + log1p(sum q expm1(d - mean d))`; otherwise, or with logits at -inf, from both log-softmaxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_source import GivenLogits, LinearLogits
from .planning import ChunkPlan
from .spec import DivergenceSpec, RowResult
from .stats import TokenStats

NEAR = 16.0  # exp(2 * NEAR) stays far from fp32 overflow
# Rounding D to bf16 costs 0.2 % of each logit difference. That is 0.3 % of the gradient where the method lives, and
# 0.5 % at a mean KL of 1: from this KL(q || p) on, D is kept in fp32.
ROUNDED_DELTA_KL = 0.25


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
    source = LinearLogits(
        spec, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias
    )
    return _run(spec, source, mask, row_weight, targets)


def divergence_logits(
    spec: DivergenceSpec,
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
) -> RowResult:
    """The same sweeps over logits the caller holds; `hidden_grad` is then the gradient of `student_logits`."""
    return _run(spec, GivenLogits(spec, student_logits, teacher_logits), mask, row_weight, targets)


def _run(spec: DivergenceSpec, source, mask: Tensor | None, row_weight: Tensor | None, targets: Tensor | None):
    value = torch.zeros(source.num_rows, dtype=source.dtype, device=source.device)
    stats = value.new_zeros(len(TokenStats._fields), source.num_rows) if spec.stats else None
    # a masked row costs nothing: the chunks are cut from the rows that count
    counted = torch.arange(source.num_rows, device=source.device) if mask is None else mask.nonzero().squeeze(1)
    plan = ChunkPlan.make(len(counted), source.vocab, source.bytes_per_logit, source.device, spec.chunk_bytes)
    source.scale_gradients(row_weight)
    near = spec.term.centred is not None
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        chunk = Chunk(spec, source, index, plan, None if targets is None else targets[index].long(), near)
        # one far chunk means a far pair of models: the others do not try the near form first
        near = chunk.near
        value[index] = chunk.divergence(None if row_weight is None else row_weight[index].to(source.dtype))
        if stats is not None:
            stats[:, index] = chunk.stats()
        del chunk  # before the next one is made: one chunk of logits at a time
    return RowResult(value, stats, *source.gradients())


class Chunk:
    """Some rows against the whole vocabulary: logits, statistics, divergence and gradient. Row vectors are `[R]`."""

    def __init__(self, spec: DivergenceSpec, source, index: Tensor, plan: ChunkPlan, target: Tensor | None, near: bool):
        self.spec, self.source, self.target = spec, source, target
        self.term, self.k = spec.term, spec.term.slope(spec.beta)
        self.cols = plan.blocks(source.vocab)
        self.tiles = list(plan.tiles(len(index)))
        self.row = torch.zeros(len(index), dtype=source.dtype, device=source.device)
        source.load(index)
        # softmax within each block takes the logits' place, unless they are needed again: for softcap's derivative, or
        # to form D
        self.keeps_logits = not near or spec.softcap is not None or source.needs_logits
        self.near = near and self._normalise_near()
        # c - mean d is KL(q || p)
        if self.near and bool((self.c - self.mean_d).mean() > ROUNDED_DELTA_KL) and source.refine():
            self._normalise_near()
        if not self.near:
            self.keeps_logits = True
            self._normalise_far()

    def _over_tiles(self):
        return ((b, tile) for b in range(len(self.cols)) for tile in self.tiles)

    # First sweep: the logits and their normalisers.

    def _normalise_near(self) -> bool:
        """lse_s and c from block softmaxes; False as soon as a logit difference is not near."""
        self._start()
        for b, cols in enumerate(self.cols):
            self.s[b] = self.source.student(cols)
            if not self.source.is_delta:
                self.other[b] = self.source.teacher(cols).sub_(self.s[b])
            for tile in self.tiles:
                s = self.s[b][tile].to(self.row.dtype)
                self._observe(b, tile, s)
                q_b = torch.softmax(s, 1)
                self.lse_b[b, tile] = s.amax(1) - q_b.amax(1).log()  # a softmax's largest entry is 1 / sum exp(s - max)
                if not self.keeps_logits:
                    self.s[b][tile] = q_b
        if not bool(self.lowest > -torch.inf):  # False for NaN
            return False
        self.lse_s = self.lse_b.logsumexp(0)
        self.rho = (self.lse_b - self.lse_s).exp()  # each block's share of q
        if self.source.is_delta:
            self.source.centre(self.argtop_s)
        for b, cols in enumerate(self.cols):
            if self.source.is_delta:
                self.other[b] = self.source.difference(cols, self.s[b])
            for tile in self.tiles:
                d = self.other[b][tile].to(self.row.dtype)
                if not bool(torch.maximum(d.amax(), -d.amin()) <= NEAR):  # False for NaN
                    return False
                self.mean_d[tile] += torch.linalg.vecdot(self._q(b, tile), d)
        excess = self.row.clone()
        for b, tile in self._over_tiles():
            d = self.other[b][tile].to(self.row.dtype) - self.mean_d[tile, None]
            excess[tile] += torch.linalg.vecdot(self._q(b, tile), d.expm1_())
        self.c = self.mean_d + torch.log1p(excess)
        return True

    def _normalise_far(self) -> None:
        self._start()
        lse_t = torch.zeros_like(self.lse_b)
        for b, cols in enumerate(self.cols):
            self.s[b] = self.source.student(cols)
            self.other[b] = self._far_difference(cols, self.s[b]) if self.source.is_delta else self.source.teacher(cols)
            for tile in self.tiles:
                s, t = self._logits(b, tile)
                self.lse_b[b, tile], lse_t[b, tile] = s.logsumexp(1), t.logsumexp(1)
                self._observe(b, tile, s)
        self.lse_s, self.lse_t = self.lse_b.logsumexp(0), lse_t.logsumexp(0)

    def _far_difference(self, cols: slice, s: Tensor) -> Tensor:
        """D; the teacher's own logit where the student has none to add it to."""
        d = self.source.difference(cols, s)
        if self.source.may_be_infinite:
            lost = torch.isneginf(s)
            if bool((lost | ~torch.isfinite(d)).any()):
                t = self.source.teacher(cols).to(d.dtype)
                d = torch.where(lost, t, torch.where(torch.isfinite(d), d, t - s))
        return d

    def _start(self) -> None:
        self.s: list = [None] * len(self.cols)  # per block: student logits, or their softmax within the block
        self.other: list = [None] * len(self.cols)  # per block: d (near) or D or T (far); the gradient at the end
        self.lse_b = self.row.new_zeros(len(self.cols), len(self.row))
        self.mean_d, self.lowest = self.row.clone(), self.row.new_zeros(())
        self.top_s, self.argtop_s = torch.full_like(self.row, -torch.inf), torch.zeros_like(self.row, dtype=torch.long)
        self.top_p, self.argtop_t = self.row.clone(), torch.zeros_like(self.argtop_s)
        self.entropy_s, self.entropy_t = self.row.clone(), self.row.clone()
        self.s_target, self.x_target = self.row.clone(), self.row.clone()

    def _observe(self, b: int, tile: slice, s: Tensor) -> None:
        """The student's most likely token, and the lowest logit where one may be -inf."""
        if self.spec.stats or (self.source.is_delta and not self.source.needs_logits):
            update_top(self.top_s[tile], self.argtop_s[tile], s, self.cols[b].start)
        if self.source.may_be_infinite:
            self.lowest = torch.minimum(self.lowest, s.amin())
        self._gather_target(self.s_target[tile], b, tile, s)

    def _gather_target(self, out: Tensor, b: int, tile: slice, values: Tensor) -> None:
        if self.spec.stats and self.target is not None:
            column = self.target[tile] - self.cols[b].start
            here = (column >= 0) & (column < values.shape[1])
            found = values.gather(1, column.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
            out.copy_(torch.where(here, found, out))

    def _logits(self, b: int, tile: slice) -> tuple[Tensor, Tensor]:
        s, other = self.s[b][tile].to(self.row.dtype), self.other[b][tile].to(self.row.dtype)
        return s, torch.where(torch.isneginf(s), other, s + other) if self.source.is_delta else other

    def _q(self, b: int, tile: slice) -> Tensor:
        if self.keeps_logits:
            return (self.s[b][tile].to(self.row.dtype) - self.lse_s[tile, None]).exp_()
        return self.s[b][tile].to(self.row.dtype) * self.rho[b, tile, None]

    # Further sweeps: the divergence and its gradient.

    def divergence(self, weight: Tensor | None) -> Tensor:
        """The rows' divergence after clips; gradients, times `weight`, go to the source."""
        spec, term = self.spec, self.term
        one_pass = self.near and spec.entry_clip is None and spec.token_clip is None and term.sum_u is not None
        self.raw, value, sum_u, lost_q = (self.row.clone() for _ in range(4))
        if one_pass:
            sum_u = term.sum_u(self.c, self.mean_d)
        for b, tile in self._over_tiles():
            q, x, l, u = self._terms(b, tile)
            self.raw[tile] += l.sum(1)
            if spec.stats:
                self._add_stats(b, tile, q, x)
            if one_pass:
                self._write_gradient(b, tile, q, u, sum_u, weight)
                continue
            if spec.entry_clip is not None:
                plain = self._plain(q, x, l)
                clipped = plain > spec.entry_clip
                value[tile] += plain.clamp_max(spec.entry_clip).sum(1)
                lost_q[tile] += (q * clipped).sum(1)
                u = u * ~clipped
            sum_u[tile] += u.sum(1)
        if spec.entry_clip is None:
            value = self.raw
        if spec.token_clip is not None:
            weight = (value <= spec.token_clip) * (1.0 if weight is None else weight)
            value = value.clamp_max(spec.token_clip)
        if spec.any_grad and not one_pass:
            for b, tile in self._over_tiles():
                q, x, l, u = self._terms(b, tile)
                if spec.entry_clip is None:
                    self._write_gradient(b, tile, q, u, sum_u, weight)
                else:
                    clipped = self._plain(q, x, l) > spec.entry_clip
                    u = u * ~clipped + (self.k * q) * (clipped.to(q.dtype) - lost_q[tile, None])
                    self._write_gradient(b, tile, q, u, sum_u, weight)
        if spec.any_grad:
            for b, cols in enumerate(self.cols):
                self.source.take_gradient(cols, self._gradient_view(b))
            self.source.finish_rows()
        return value

    def _terms(self, b: int, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, x, l', u' of a tile."""
        beta = self.spec.beta
        if self.near:
            q = self._q(b, tile)
            x = self.other[b][tile].to(self.row.dtype) - self.c[tile, None]
            return q, x, *self.term.centred(x, q, beta)
        s, t = self._logits(b, tile)
        log_q, log_p = s - self.lse_s[tile, None], t - self.lse_t[tile, None]
        absent = torch.isneginf(log_q) & torch.isneginf(log_p)
        q, p = log_q.exp(), log_p.exp()
        x = torch.where(absent, 0.0, log_p - log_q)
        l, u = self.term.term(log_p, log_q, beta)
        l, u = torch.where(absent, 0.0, l - self.k * (p - q)), torch.where(absent, 0.0, u + self.k * q)
        if self.term.centred is not None:
            close = x.abs() < 1
            for exact, centred in zip((l, u), self.term.centred(x.clamp(-1, 1), q, beta), strict=True):
                exact[close] = centred[close]
        return q, x, l, u

    def _plain(self, q: Tensor, x: Tensor, l: Tensor) -> Tensor:
        """The textbook term, which is what a clip looks at: l = l' + k (p - q)."""
        return l if self.k == 0 else torch.addcmul(l, q, torch.expm1(x), value=self.k)

    def _write_gradient(self, b: int, tile: slice, q: Tensor, u: Tensor, sum_u: Tensor, weight: Tensor | None) -> None:
        """Put a tile of the gradient, by the raw logits, where the teacher's logits were."""
        if not self.spec.any_grad:
            return
        g = torch.addcmul(u, q, sum_u[tile, None], value=-1)
        factor = 1 / self.spec.temperature
        if self.spec.softcap is not None:
            capped = self.s[b][tile].to(self.row.dtype) * (self.spec.temperature / self.spec.softcap)
            g.mul_((1 - capped * capped) * factor)
        elif factor != 1:
            g.mul_(factor)
        if weight is not None:
            g.mul_(weight[tile, None])
        if self.source.grad_scale is not None:
            g.mul_(self.source.grad_scale)
        self._gradient_view(b)[tile] = g

    def _gradient_view(self, b: int) -> Tensor:
        """The teacher's block as a tensor of the gradient's dtype; rows stay where they were, so writes are safe."""
        columns = self.cols[b].stop - self.cols[b].start
        return self.source.gradient_storage(self.other[b])[:, :columns]

    # Statistics.

    def _add_stats(self, b: int, tile: slice, q: Tensor, x: Tensor) -> None:
        p = q * torch.exp(x) if self.near else (self._logits(b, tile)[1] - self.lse_t[tile, None]).exp()
        self.entropy_s[tile] += torch.special.entr(q).sum(1)
        self.entropy_t[tile] += torch.special.entr(p).sum(1)
        update_top(self.top_p[tile], self.argtop_t[tile], p, self.cols[b].start)
        self._gather_target(self.x_target[tile], b, tile, x)

    def stats(self) -> Tensor:
        agree = (self.argtop_s == self.argtop_t).to(self.row.dtype)
        confidence, logprob = (self.top_s - self.lse_s).exp(), self.s_target - self.lse_s
        return torch.stack(
            [self.raw, self.entropy_s, self.entropy_t, logprob, logprob + self.x_target, confidence, agree]
        )


def update_top(top: Tensor, argtop: Tensor, values: Tensor, start: int) -> None:
    """Running row maximum `top` `[R]` and its column `argtop`, over blocks that start at column `start`."""
    block_top, block_arg = values.max(1)
    better = block_top > top
    argtop.copy_(torch.where(better, block_arg + start, argtop))
    top.copy_(torch.where(better, block_top, top))
