"""Backend "torch": any device, the CPU default. Also the readable form of what the Triton backends do.

A chunk of rows is computed block of the vocabulary by block, in two buffers of the chunk's size that live as long as
the call. A first sweep leaves the student's softmax `q` in one and the logit differences in the other. A second one
subtracts their mean under `q`, which leaves `y`, and finds `c = log1p(sum q expm1(y))`. Terms depend on `x = y - c`: a
third sweep sums them and puts `u` in the place of `y`, and a fourth turns that into the gradient

    dD/ds_j = u_j - q_j sum_v u_v,      u_j = u'_j, or k q_j where an entry clip has bitten

(see `divergences` for u' and k). Terms with a `shifted` form need no third sweep. Where the gradient goes to hidden
states alone, factors that belong to a row are applied to the `[R, H]` product instead of to `[R, V]`.

With logit differences beyond NEAR, or logits at -inf, the buffers hold both models' logits instead, and terms are taken
from both log-softmaxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning import ChunkPlan, chunk_plan
from ..spec import DivergenceSpec, RowResult
from ..stats import TokenStats
from . import passes
from .logit_source import GivenLogits, LinearLogits
from .row_stats import RowStats

# exp(2 * NEAR) does not overflow fp32, and where q underflows, p = q exp(x) is below exp(NEAR - 87): nothing. Pairs
# with a mean KL of 0.1 have rare entries beyond 16.
NEAR = 40.0
# Rounding D to bf16 costs 0.2 % of each logit difference. That is 0.3 % of the gradient where the method lives, and
# 0.5 % at a mean KL of 1: from this KL on, D is kept in fp32.
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
    plan = chunk_plan(spec, source, len(counted), buffers=2)
    buffers = [value.new_empty(min(plan.rows, len(counted)) * source.vocab) for _ in range(2)]
    source.scale_gradients(row_weight)
    near = spec.term.centred is not None
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        target = None if targets is None else targets[index].long() - source.shards.start
        chunk = Chunk(spec, source, index, plan, buffers, target, near)
        # one far chunk means a far pair of models: the others do not try the near form first
        near = chunk.near
        value[index] = chunk.divergence(None if row_weight is None else row_weight[index].to(source.dtype))
        if stats is not None:
            stats[:, index] = chunk.stats()
    return RowResult(value, stats, *source.gradients())


class Chunk:
    """Some rows against the whole vocabulary: logits, statistics, divergence and gradient. Row vectors are `[R]`."""

    def __init__(
        self,
        spec: DivergenceSpec,
        source,
        index: Tensor,
        plan: ChunkPlan,
        buffers: list[Tensor],
        target: Tensor | None,
        near: bool,
    ):
        self.spec, self.source, self.target, self.term = spec, source, target, spec.term
        self.shards = source.shards
        self.cols = plan.blocks(source.vocab)
        self.tiles = list(plan.tiles(len(index)))
        self.row = torch.zeros(len(index), dtype=source.dtype, device=source.device)
        self.run = passes.compiled if spec.compiled else lambda function: function
        # per block: softmax within the block, or the student's logits; y, u, or the teacher's logits
        self.s, self.other = (
            [buffer[len(index) * c.start : len(index) * c.stop].view(len(index), -1) for c in self.cols]
            for buffer in buffers
        )
        source.load(index)
        # softcap's derivative and some logit differences need the logits themselves
        self.keeps_logits = not near or spec.softcap is not None or (source.is_delta and source.needs_logits)
        plain = spec.entry_clip is None and not spec.stats
        self.shifted = self.term.shifted if plain and near and not self.keeps_logits else None
        self.near = near and self._normalise_near()
        if self.near and source.rounds_difference and bool(self.c.mean() > ROUNDED_DELTA_KL):  # c is KL(q || p)
            source.keep_difference()
            self._normalise_near()
        if not self.near:
            self.keeps_logits, self.shifted = True, None
            self._normalise_far()

    def _over_tiles(self):
        return ((b, tile) for b in range(len(self.cols)) for tile in self.tiles)

    # First sweep: the logits and their normalisers.

    def _normalise_near(self) -> bool:
        """Softmaxes, differences and their means; False as soon as a logit difference is not near."""
        self._start()
        mean_b = torch.zeros_like(self.lse_b)
        for b, cols in enumerate(self.cols):
            s = self.source.student(cols)
            d = None if self.source.is_delta else self.source.teacher(cols).sub_(s)
            if b == 0 and d is not None:
                # what is stored must be small before it is rounded; a constant changes no softmax
                first = self.shards.of_first(d[:, 0].clone())[:, None]
            for tile in self.tiles:
                q_b = self._softmax(b, tile, s[tile])
                if d is not None:
                    d[tile] -= first[tile]
                    mean_b[b, tile] = self.run(passes.difference)(d[tile], 1.0, q_b, self.other[b][tile])
        if not self.shards.all(bool(self.lowest > -torch.inf), self.row.device):  # False for NaN
            return False
        self._normalise_student()
        if self.source.is_delta:
            if self.source.rounds_difference:
                self.source.centre(self.top_token(), self.top_b.amax(0))
            for b, cols in enumerate(self.cols):
                d = self.source.difference(cols, self.s[b])
                for tile in self.tiles:
                    arguments = d[tile], self.source.scale, self._q(b, tile)[0], self.other[b][tile]
                    mean_b[b, tile] = self.run(passes.difference)(*arguments)
        (mean,) = self.shards.sum((mean_b if self.keeps_logits and self.source.is_delta else mean_b * self.rho).sum(0))
        near = True
        for b, tile in self._over_tiles():
            q, rho = self._q(b, tile)
            if self.shifted is None:
                low, high, mean_e = self.run(passes.centred)(mean[tile], q, self.other[b][tile])
            else:
                run = self.run(passes.centred_kl)
                low, high, mean_e, mean_l = run(self.shifted.term, mean[tile], q, self.other[b][tile])
                self.mean_l[tile] += mean_l * rho
            near = bool(torch.maximum(high, -low) <= NEAR)  # False for NaN
            if not near:
                break
            self.mean_e[tile] += mean_e if rho is None else mean_e * rho
        if not self.shards.all(near, self.row.device):
            return False
        self.mean_e, self.mean_l = self.shards.sum(self.mean_e, self.mean_l)
        self.c = torch.log1p(self.mean_e)
        return True

    def _normalise_far(self) -> None:
        self._start()
        lse_t = torch.zeros_like(self.lse_b)
        for b, cols in enumerate(self.cols):
            s = self.source.student(cols)
            t = self._far_teacher(cols, s)
            for tile in self.tiles:
                self._softmax(b, tile, s[tile])
                lse_t[b, tile] = self.other[b][tile].copy_(t[tile]).logsumexp(1)
        self._normalise_student()
        self.lse_t = self.shards.logsumexp(lse_t.logsumexp(0))

    def _far_teacher(self, cols: slice, s: Tensor) -> Tensor:
        """The teacher's logits: S + D, but as they are where the student has none to add to."""
        if not self.source.is_delta:
            return self.source.teacher(cols)
        d = self.source.difference(cols, s)
        t = torch.add(s, d, alpha=self.source.scale)
        if self.source.may_be_infinite:
            lost = torch.isneginf(s) | ~torch.isfinite(d)
            if bool(lost.any()):
                t = torch.where(lost, self.source.teacher(cols).to(t.dtype), t)
        return t

    def _start(self) -> None:
        self.top_b = self.row.new_empty(len(self.cols), len(self.row))
        self.lse_b = torch.empty_like(self.top_b)
        self.lowest = self.row.new_zeros(())
        self.mean_e, self.mean_l = self.row.clone(), self.row.clone()
        self.row_stats = RowStats(self.row, self.target) if self.spec.stats else None

    def _softmax(self, b: int, tile: slice, s: Tensor) -> Tensor:
        """A tile of student logits, as they come from the source, into the first buffer; their softmax in the block."""
        kept = self.s[b][tile]
        s = s.to(kept.dtype)
        q_b = torch.empty_like(kept) if self.keeps_logits else kept
        self.top_b[b, tile], self.lse_b[b, tile] = self.run(passes.block_softmax)(s, q_b)
        if self.keeps_logits:
            kept.copy_(s)
        if self.source.may_be_infinite:
            self.lowest = torch.minimum(self.lowest, s.amin())
        if self.row_stats is not None:
            self.row_stats.see_student(self.cols[b].start, tile, s)
        return q_b

    def _normalise_student(self) -> None:
        self.lse_s = self.shards.logsumexp(self.lse_b.logsumexp(0))
        self.rho = (self.lse_b - self.lse_s).exp()  # each block's share of q

    def top_token(self) -> Tensor:
        """The student's most likely token of this share: the largest entry of the block with a row's largest logit."""
        best, found = self.top_b.argmax(0), torch.zeros_like(self.row, dtype=torch.long)
        for b, cols in enumerate(self.cols):
            here = (best == b).nonzero().squeeze(1)
            found[here] = self.s[b][here].argmax(1) + cols.start
        return found

    def _q(self, b: int, tile: slice) -> tuple[Tensor, Tensor | None]:
        """The student's probabilities in a tile as two factors, the second one per row, or None for 1."""
        if self.keeps_logits:
            return (self.s[b][tile] - self.lse_s[tile, None]).exp_(), None
        return self.s[b][tile], self.rho[b, tile]

    # Further sweeps: the divergence and its gradient.

    def divergence(self, weight: Tensor | None) -> Tensor:
        """The rows' divergence after clips; gradients, times `weight`, go to the source."""
        spec = self.spec
        if self.shifted is not None:
            value, centre, scale = self.shifted.finish(self.mean_l, self.mean_e)
        else:
            self.raw, value, sum_u, scale = self.row.clone(), self.row.clone(), self.row.clone(), None
            for b, tile in self._over_tiles():
                *parts, u = self._terms(b, tile)
                for total, part in zip((self.raw, value, sum_u), parts, strict=True):
                    total[tile] += part
                self.other[b][tile] = u
            self.raw, value, sum_u = self.shards.sum(self.raw, value, sum_u)
        factor = self.row.new_full(self.row.shape, 1 / spec.temperature)
        for f in (scale, weight, self.source.grad_scale, None if spec.token_clip is None else value <= spec.token_clip):
            factor = factor if f is None else factor * f
        if spec.any_grad:
            late = self.source.scales_late and spec.softcap is None
            for b, cols in enumerate(self.cols):
                g = self.source.gradient_storage(self.other[b])
                for tile in self.tiles:
                    q, rho = self._q(b, tile)
                    # q's second factor goes with the row's where q is one of the gradient's factors
                    if self.shifted is not None:
                        now = None if late else (factor * self.rho[b])[tile]
                        out = None if g is self.other[b] else g[tile]
                        self.run(passes.shifted_gradient)(self.other[b][tile], q, centre[tile], now, out)
                    else:
                        mass = sum_u[tile] if rho is None else sum_u[tile] * rho
                        now = None if late else self._slope(b, tile, factor[tile])
                        g[tile] = self.run(passes.gradient)(self.other[b][tile], q, mass, now)
                after = None if not late else factor if self.shifted is None else factor * self.rho[b]
                self.source.take_gradient(cols, g, after)
            self.source.finish_rows()
        return value if spec.token_clip is None else value.clamp_max(spec.token_clip)

    def _terms(self, b: int, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of l', of the terms after the clip, and of u, and u, to take the place of y or the teacher's logits."""
        spec = self.spec
        if self.near:
            q, rho = self._q(b, tile)
            if spec.stats:
                self._add_stats(b, tile)
            run = self.run(passes.near_terms)
            return run(self.term, spec.beta, spec.entry_clip, q, rho, self.other[b][tile], self.c[tile])
        if spec.stats:
            self._add_stats(b, tile)
        log_q = self.s[b][tile] - self.lse_s[tile, None]
        run = self.run(passes.far_terms)
        return run(self.term, spec.beta, spec.entry_clip, log_q, self.other[b][tile], self.lse_t[tile])

    def _slope(self, b: int, tile: slice, factor: Tensor) -> Tensor:
        """The row's factor, times softcap's derivative."""
        if self.spec.softcap is None:
            return factor
        capped = self.s[b][tile] * (self.spec.temperature / self.spec.softcap)
        return (1 - capped * capped) * factor[:, None]

    def _add_stats(self, b: int, tile: slice) -> None:
        q, rho = self._q(b, tile)
        q = q if rho is None else q * rho[:, None]
        if self.near:
            x = self.other[b][tile] - self.c[tile, None]
            p = q * torch.exp(x)
        else:
            log_p = self.other[b][tile] - self.lse_t[tile, None]
            p, x = log_p.exp(), (log_p - (self.s[b][tile] - self.lse_s[tile, None])).nan_to_num_(nan=0.0)
        self.row_stats.add(self.cols[b].start, tile, q, p, x)

    def stats(self) -> Tensor:
        top, token = self.shards.at_largest(self.top_b.amax(0), self.top_token() + self.shards.start)
        return self.row_stats.result(self.raw, top, token, self.lse_s, self.shards)
