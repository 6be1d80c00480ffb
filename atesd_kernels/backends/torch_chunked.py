"""Backend "torch": runs on any device and is the CPU default. It is also the readable form of the Triton backend.

The call allocates two buffers `[rows of a chunk, V]`. Each sweep over a chunk visits the vocabulary block by block:

1. writes the student's softmax `q` to one buffer and the logit differences to the other;
2. subtracts the differences' mean under `q`, which gives `y`, and finds `c = log1p(sum q expm1(y))`;
3. sums the terms, which depend on `x = y - c`, and replaces `y` by `u` (a `shifted` term skips this sweep);
4. replaces `u` by the gradient (see `divergences` for u' and k)

    dD/ds_j = u_j - q_j sum_v u_v,      u_j = u'_j, or k q_j if the entry clip applies

If only hidden states need a gradient, row factors multiply the `[R, H]` product, not `[R, V]`. If a logit difference
exceeds NEAR, or a logit is -inf, the buffers hold both models' logits and terms come from both log-softmaxes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..planning import ChunkPlan, chunk_plan
from ..spec import DivergenceSpec, RowResult
from ..stats import TokenStats
from . import passes
from .cpp_chunk import CppChunk, cpp_fits
from .logit_source import GivenLogits, LinearLogits
from .passes import NEAR
from .row_stats import RowStats

# Rounding D to bf16 costs 0.2 % of each logit difference. That is 0.3 % of the gradient at the method's usual KLs and
# 0.5 % at a mean KL of 1. Above this KL, D is fp32.
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
    return run(spec, source, mask, row_weight, targets)


def divergence_logits(
    spec: DivergenceSpec,
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
) -> RowResult:
    """Runs the same sweeps over the caller's logits. The result's `hidden_grad` is the gradient of `student_logits`."""
    return run(spec, GivenLogits(spec, student_logits, teacher_logits), mask, row_weight, targets)


def run(spec: DivergenceSpec, source, mask: Tensor | None, row_weight: Tensor | None, targets: Tensor | None):
    value = torch.zeros(source.num_rows, dtype=source.dtype, device=source.device)
    stats = value.new_zeros(len(TokenStats._fields), source.num_rows) if spec.stats else None
    # chunks contain unmasked rows only, so a masked row costs nothing
    counted = torch.arange(source.num_rows, device=source.device) if mask is None else mask.nonzero().squeeze(1)
    in_cpp = cpp_fits(spec, source)
    plan = chunk_plan(spec, source, len(counted), buffers=2, in_cpp=in_cpp)
    buffers = value.new_empty(2 * min(plan.rows, len(counted)) * source.vocab)
    source.scale_gradients(row_weight)
    near = spec.term.centred is not None
    for rows in plan.row_chunks(len(counted)):
        index = counted[rows]
        target = None if targets is None else targets[index].long() - source.shards.start
        source.load(index)
        weight = None if row_weight is None else row_weight[index].to(source.dtype)
        # after one far chunk, assume that the models are far apart: skip the near form from then on
        chunk, found = None, None
        if near:
            chunk = (CppChunk if in_cpp else NearChunk)(spec, source, len(index), plan, buffers, target)
            found = chunk.divergence(weight) if chunk.normalise() else None
        if found is None:
            if near and source.device.type == "cpu":  # FarChunk has more temporaries of a block
                source.work.forget()
                plan = replace(plan, columns=max(1, plan.columns // 2))
            near, chunk = False, FarChunk(spec, source, len(index), plan, buffers, target)
            chunk.normalise()
            found = chunk.divergence(weight)
        value[index] = found
        if stats is not None:
            stats[:, index] = chunk.stats()
    return RowResult(value, stats, *source.gradients())


class Chunk:
    """Some rows over all blocks of the vocabulary: what `NearChunk` and `FarChunk` share. Row vectors are `[R]`.

    Attributes:
        s: per block, the student's kept logits (see `Scaling`) if `keeps_logits`, else their softmax in the block.
        other: per block, y (near) or the teacher's logits (far); sweep 3 replaces them by u.
    """

    keeps_logits: bool

    def __init__(
        self, spec: DivergenceSpec, source, rows: int, plan: ChunkPlan, buffers: Tensor, target: Tensor | None
    ):
        self.spec, self.source, self.target, self.term = spec, source, target, spec.term
        self.shards, self.scaling = source.shards, source.scaling
        self.cols = plan.blocks(source.vocab)
        self.tiles = list(plan.tiles(rows))
        self.row = torch.zeros(rows, dtype=source.dtype, device=source.device)
        self.run = passes.compiled if spec.compiled else lambda function: function
        self.s, self.other = (
            [buffer[rows * c.start : rows * c.stop].view(rows, -1) for c in self.cols] for buffer in buffers.chunk(2)
        )

    def over_tiles(self):
        return ((b, tile) for b in range(len(self.cols)) for tile in self.tiles)

    def start(self) -> None:
        self.top_b = self.row.new_empty(len(self.cols), len(self.row))
        self.lse_b = torch.empty_like(self.top_b)
        self.lowest = self.row.new_zeros(())
        self.row_stats = RowStats(self.row, self.target) if self.spec.stats else None

    def softmax(self, b: int, tile: slice, s: Tensor) -> Tensor:
        """Stores a tile's student logits, or their softmax, in the first buffer. Returns the block softmax `[r, C]`."""
        out = self.s[b][tile]
        s = s.to(out.dtype)
        if self.keeps_logits:
            out.copy_(s)
            out = torch.empty_like(out)
        s = self.scaling.student(s)
        self.top_b[b, tile], self.lse_b[b, tile] = self.run(passes.block_softmax)(s, out)
        if self.source.may_be_infinite:
            self.lowest = torch.minimum(self.lowest, s.amin())
        if self.row_stats is not None:
            self.row_stats.see_student(self.cols[b].start, tile, s)
        return out

    def logits(self, b: int, tile: slice) -> Tensor:
        """Returns the student's scaled logits, `[r, C]`, if `keeps_logits`."""
        return self.scaling.student(self.s[b][tile])

    def normalise_student(self) -> None:
        self.lse_s = self.shards.logsumexp(self.lse_b.logsumexp(0))
        self.rho = (self.lse_b - self.lse_s).exp()  # probability of each block under q

    def q(self, b: int, tile: slice) -> tuple[Tensor, Tensor | None]:
        """Returns the student's probabilities in a tile as two factors: `[r, C]`, and `[r]` or None for 1."""
        if self.keeps_logits:
            return (self.logits(b, tile) - self.lse_s[tile, None]).exp_(), None
        return self.s[b][tile], self.rho[b, tile]

    def terms(self, b: int, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns sums of l', clipped terms and u, `[r]` each, and u `[r, C]`."""
        raise NotImplementedError

    def add_stats(self, b: int, tile: slice) -> None:
        """Adds a tile to `row_stats`, before u replaces what they are computed from."""
        raise NotImplementedError

    def divergence(self, weight: Tensor | None) -> Tensor:
        """Returns the rows' divergence after clips, `[R]`. Passes gradients, times `weight` `[R]`, to the source."""
        self.raw, value, sum_u = self.row.clone(), self.row.clone(), self.row.clone()
        for b, tile in self.over_tiles():
            if self.row_stats is not None:
                self.add_stats(b, tile)
            *parts, u = self.terms(b, tile)
            for total, part in zip((self.raw, value, sum_u), parts, strict=True):
                total[tile] += part
            self.other[b][tile] = u
        self.raw, value, sum_u = self.shards.sum(self.raw, value, sum_u)
        if self.spec.any_grad:
            factor = self.row_factor(value, None, weight)
            late = self.source.scales_late and self.spec.softcap is None
            for b, cols in enumerate(self.cols):
                g = self.source.gradient_storage(self.other[b])
                for tile in self.tiles:
                    q, rho = self.q(b, tile)
                    mass = sum_u[tile] if rho is None else sum_u[tile] * rho
                    now = None if late else self.softcap_slope(b, tile, factor[tile])
                    g[tile] = self.run(passes.gradient)(self.other[b][tile], q, mass, now)
                self.source.take_gradient(cols, g, factor if late else None)
            self.source.finish_rows()
        return self.clipped(value)

    def row_factor(self, value: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
        """Returns the factor of each row's gradient, `[R]`: 0 if the token clip applies."""
        factor, clip = self.row.new_full(self.row.shape, 1 / self.spec.temperature), self.spec.token_clip
        for f in (scale, weight, self.source.grad_scale, None if clip is None else value <= clip):
            factor = factor if f is None else factor * f
        return factor

    def clipped(self, value: Tensor) -> Tensor:
        return value if self.spec.token_clip is None else value.clamp_max(self.spec.token_clip)

    def softcap_slope(self, b: int, tile: slice, factor: Tensor) -> Tensor:
        """Returns the row's factor times the derivative of softcap."""
        if self.spec.softcap is None:
            return factor
        return self.scaling.slope(self.s[b][tile]) * factor[:, None]

    def top_token(self) -> Tensor:
        """Returns the student's most likely token in this shard, `[R]`: searches the block with the largest logit."""
        best, found = self.top_b.argmax(0), torch.zeros_like(self.row, dtype=torch.long)
        for b, cols in enumerate(self.cols):
            here = (best == b).nonzero().squeeze(1)
            found[here] = self.s[b][here].argmax(1) + cols.start
        return found

    def stats(self) -> Tensor:
        top, token = self.shards.select_at_global_argmax(self.top_b.amax(0), self.top_token() + self.shards.start)
        return self.row_stats.result(self.raw, top, token, self.lse_s, self.shards)


class NearChunk(Chunk):
    """Rows whose logit differences stay within NEAR: terms come from x = y - c, which loses no digits near p = q."""

    def __init__(self, spec: DivergenceSpec, source, *arguments):
        super().__init__(spec, source, *arguments)
        # the derivative of softcap and some logit differences need the student's logits
        self.keeps_logits = spec.softcap is not None or (source.is_delta and source.scaling.needs_logits)
        plain = spec.entry_clip is None and not spec.stats and not self.keeps_logits
        self.shifted = self.term.shifted if plain else None

    def normalise(self) -> bool:
        """Runs sweeps 1 and 2. Returns False if a logit difference exceeds NEAR or a student logit is -inf."""
        if not self._sweep():
            return False
        if self.source.rounds_difference and bool(self.c.mean() > ROUNDED_DELTA_KL):  # c is KL(q || p)
            self.source.keep_difference()
            return self._sweep()
        return True

    def _sweep(self) -> bool:
        mean_b = self._softmax_and_differences()
        if not self.shards.all(bool(self.lowest > -torch.inf), self.row.device):  # False for NaN
            return False
        self.normalise_student()
        if self.source.is_delta:
            mean_b = self._differences_of_a_shared_head()
        (mean,) = self.shards.sum((mean_b if self.keeps_logits and self.source.is_delta else mean_b * self.rho).sum(0))
        return self._centre(mean)

    def _softmax_and_differences(self) -> Tensor:
        """Sweep 1: stores the student, and the differences from a teacher with a head of its own. Returns their means
        under each block's softmax, `[blocks, R]`."""
        self.start()
        mean_b = torch.zeros_like(self.lse_b)
        for b, cols in enumerate(self.cols):
            if self.source.is_delta:
                s, d = self.source.student(cols), None
            else:
                s, d = self.source.student_and_difference(cols)
            if b == 0 and d is not None:
                # differences must be small before they are rounded; a constant changes no softmax
                first = self.shards.broadcast_from_first(d[:, 0].clone())[:, None]
            for tile in self.tiles:
                q_b = self.softmax(b, tile, s[tile])
                if d is not None:
                    d[tile] -= first[tile]
                    mean_b[b, tile] = self.run(passes.difference)(d[tile], 1.0, q_b, self.other[b][tile])
            s = d = None  # before the next block takes as much
        return mean_b

    def _differences_of_a_shared_head(self) -> Tensor:
        """The rest of sweep 1 for a shared head: stores D, which is centred on the student's most likely token."""
        mean_b = torch.zeros_like(self.lse_b)
        if self.source.rounds_difference:
            self.source.centre(self.top_token(), self.top_b.amax(0))
        for b, cols in enumerate(self.cols):
            d = self.source.difference(cols, self.s[b])
            for tile in self.tiles:
                arguments = d[tile], self.source.scale, self.q(b, tile)[0], self.other[b][tile]
                mean_b[b, tile] = self.run(passes.difference)(*arguments)
        return mean_b

    def _centre(self, mean: Tensor) -> bool:
        """Sweep 2: subtracts the rows' `mean` `[R]` and finds c. Returns False if a difference exceeds NEAR."""
        self.mean_e, self.mean_l = self.row.clone(), self.row.clone()
        near = True
        for b, tile in self.over_tiles():
            q, rho = self.q(b, tile)
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

    def terms(self, b: int, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, rho = self.q(b, tile)
        run = self.run(passes.near_terms)
        return run(self.term, self.spec.beta, self.spec.entry_clip, q, rho, self.other[b][tile], self.c[tile])

    def add_stats(self, b: int, tile: slice) -> None:
        q, rho = self.q(b, tile)
        q = q if rho is None else q * rho[:, None]
        x = self.other[b][tile] - self.c[tile, None]
        self.row_stats.add(self.cols[b].start, tile, q, q * torch.exp(x), x)

    def divergence(self, weight: Tensor | None) -> Tensor:
        if self.shifted is None:
            return super().divergence(weight)
        # sweep 2 has summed the terms
        value, centre, scale = self.shifted.finish(self.mean_l, self.mean_e)
        if self.spec.any_grad:
            factor = self.row_factor(value, scale, weight)
            late = self.source.scales_late
            for b, cols in enumerate(self.cols):
                g = self.source.gradient_storage(self.other[b])
                block_factor = factor * self.rho[b]  # the gradient is a multiple of q, whose second factor is rho
                for tile in self.tiles:
                    now, out = None if late else block_factor[tile], None if g is self.other[b] else g[tile]
                    self.run(passes.shifted_gradient)(self.other[b][tile], self.s[b][tile], centre[tile], now, out)
                self.source.take_gradient(cols, g, block_factor if late else None)
            self.source.finish_rows()
        return self.clipped(value)


class FarChunk(Chunk):
    """Any other rows: the buffers hold both models' logits, and terms come from both log-softmaxes."""

    keeps_logits = True

    def normalise(self) -> None:
        self.start()
        lse_t = torch.zeros_like(self.lse_b)
        for b, cols in enumerate(self.cols):
            s = self.source.student(cols)
            t = self._teacher(cols, s)
            for tile in self.tiles:
                self.softmax(b, tile, s[tile])
                lse_t[b, tile] = self.other[b][tile].copy_(t[tile]).logsumexp(1)
        self.normalise_student()
        self.lse_t = self.shards.logsumexp(lse_t.logsumexp(0))

    def _teacher(self, cols: slice, s: Tensor) -> Tensor:
        """Returns the teacher's logits, as S + D; computes them directly where S is -inf or D is not finite."""
        if not self.source.is_delta:
            return self.source.teacher(cols)
        d = self.source.difference(cols, s)
        s = self.scaling.student(s)
        t = torch.add(s, d, alpha=self.source.scale)
        if self.source.may_be_infinite:
            lost = torch.isneginf(s) | ~torch.isfinite(d)
            if bool(lost.any()):
                t = torch.where(lost, self.source.teacher(cols).to(t.dtype), t)
        return t

    def terms(self, b: int, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_q = self.logits(b, tile) - self.lse_s[tile, None]
        run = self.run(passes.far_terms)
        return run(self.term, self.spec.beta, self.spec.entry_clip, log_q, self.other[b][tile], self.lse_t[tile])

    def add_stats(self, b: int, tile: slice) -> None:
        log_q, log_p = self.logits(b, tile) - self.lse_s[tile, None], self.other[b][tile] - self.lse_t[tile, None]
        self.row_stats.add(self.cols[b].start, tile, log_q.exp(), log_p.exp(), (log_p - log_q).nan_to_num_(nan=0.0))
