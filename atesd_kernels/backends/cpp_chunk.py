"""Backend "cpp": the near form of `torch_chunked` for rows of one chunk, with C++ for all that is not a product.

A chunk's logits lie row by row, so that a thread reads a row from memory once for all of its loops. With bf16 inputs,
and bf16 instructions, the products are bf16 ones with fp32 results, so the difference of logits is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpp import library
from ..divergences import term_of_key
from ..planning import ChunkPlan
from ..spec import DivergenceSpec, LossSpec
from .passes import NEAR
from .row_stats import stacked


def cpp_fits(spec: DivergenceSpec, source) -> bool:
    """Whether C++ has this loss. The rest of backend "cpp" is backend "torch"."""
    own = term_of_key(spec.divergence).name == spec.divergence and spec.divergence in library.TERMS
    a_kl = spec.divergence == "alpha" and spec.beta in (0, 1)
    return rows_fit(spec, source) and own and not a_kl


def rows_fit(spec: LossSpec, source) -> bool:
    return spec.in_cpp and spec.softcap is None and spec.group is None and source.dtype == torch.float32


def put(block: Tensor, place: Tensor) -> None:
    """Copies a block of logits to its place in the rows, if its product was not written there (`Workspace.lending`)."""
    if block.data_ptr() != place.data_ptr():
        place.copy_(block)


class CppChunk:
    """Some rows over the whole vocabulary. `normalise` forms the logits, `divergence` the rest.
    Row vectors are `[R]`."""

    def __init__(
        self, spec: DivergenceSpec, source, rows: int, plan: ChunkPlan, buffers: Tensor, target: Tensor | None
    ):
        self.spec, self.source, self.plan, self.target = spec, source, plan, target
        self.both = buffers[: 2 * rows * source.vocab].view(2 * rows, -1)
        self.s, self.d = self.both.chunk(2)

    def normalise(self) -> bool:
        """Forms student logits and differences. Always returns True: `divergence` finds out whether they are near."""
        source = self.source
        if source.is_plain:
            source.keep_difference()
        source.scaling.late = source.is_plain
        first = None
        for cols in source.product_blocks(self.plan):
            places = {"both": self.both[:, cols], "student": self.s[:, cols], "difference": self.d[:, cols]}
            with source.work.lending(**places):
                s, d = source.student_and_difference(cols)
            if not source.is_delta:
                # differences must be small before they are rounded; a constant changes no softmax
                first = d[:, :1].clone() if first is None else first
                d.sub_(first)
            put(s, self.s[:, cols])
            put(d, self.d[:, cols])
            s = d = None  # before the next block takes as much
        source.scaling.late = False
        return True

    def divergence(self, weight: Tensor | None) -> Tensor | None:
        """Returns the rows' divergence after clips. Passes gradients, times `weight`, to the source.

        Returns None, and passes none, if a logit difference exceeds NEAR or a logit is not finite.
        """
        spec, source = self.spec, self.source
        scale_s, scale_d = (1 / spec.temperature, source.scale) if source.is_plain else (1.0, 1.0)
        at_target = self.gather() if spec.stats else None
        factor = torch.full((len(self.s),), 1 / spec.temperature, dtype=torch.float32)
        for f in (weight, source.grad_scale):
            factor = factor if f is None else factor * f
        late = source.scales_late
        out = source.row_gradient(self.d) if spec.any_grad else None
        found, tokens = library.divergence(
            *(spec.divergence, spec.beta, self.s, self.d, out, scale_s, scale_d, spec.entry_clip),
            None if late else factor,
            spec.stats,
        )
        if not bool((found["extreme"] <= NEAR).all()):  # False for NaN
            return None
        value = found["value"]
        if at_target is not None:
            s_target, d_target, here = at_target
            logprob = torch.where(here, s_target * scale_s, 0.0) - found["lse"]
            x_target = torch.where(here, (d_target - found["mean"]) * scale_d - found["c"], 0.0)
            agree = tokens[0] == tokens[1]
            self.row_stats = stacked(
                *(found["raw"], found["entropy_s"], found["entropy_t"], logprob, x_target),
                *(found["top"] - found["lse"], agree),
            )
        if out is not None:
            kept = None if spec.token_clip is None else (value <= spec.token_clip).to(factor.dtype)
            if late:
                factor = factor * found["scale"] if kept is None else factor * found["scale"] * kept
            elif kept is not None:
                out *= kept[:, None].to(out.dtype)
            for cols in self.plan.blocks(source.vocab):  # oneDNN multiplies blocks faster than the whole
                source.take_gradient(cols, out[:, cols])
            source.finish_rows(factor if late else None)
        return value if spec.token_clip is None else value.clamp_max(spec.token_clip)

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logit and difference at the targets, and where there is a target."""
        if self.target is None:
            nowhere = torch.zeros(len(self.s), dtype=torch.float32)
            return nowhere, nowhere, nowhere.bool()
        here = (self.target >= 0) & (self.target < self.source.vocab)
        column = self.target.clamp(0, self.source.vocab - 1)[:, None]
        return self.s.gather(1, column)[:, 0], self.d.gather(1, column)[:, 0], here

    def stats(self) -> Tensor:
        return self.row_stats
