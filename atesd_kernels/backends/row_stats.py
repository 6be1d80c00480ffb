"""The torch backend's sums for `TokenStats`, accumulated tile by tile. The loss does not need them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shards import Shards


class RowStats:
    """Accumulates statistics of a chunk's rows. Tiles are `[r, C]`, vectors `[R]`; a block starts at column `start`."""

    def __init__(self, like: Tensor, target: Tensor | None):
        self.target = target  # [R]
        self.entropy_s, self.entropy_t, self.top_p, self.s_target, self.x_target = (
            torch.zeros_like(like) for _ in range(5)
        )
        self.argtop_t = torch.zeros_like(like, dtype=torch.long)

    def see_student(self, start: int, tile: slice, s: Tensor) -> None:
        """Stores the student's logits at the targets."""
        self._gather_target(self.s_target[tile], start, tile, s)

    def add(self, start: int, tile: slice, q: Tensor, p: Tensor, x: Tensor) -> None:
        """Adds a tile, given both distributions and x = log p - log q."""
        self.entropy_s[tile] += torch.special.entr(q).sum(1)
        self.entropy_t[tile] += torch.special.entr(p).sum(1)
        self._gather_target(self.x_target[tile], start, tile, x)
        block_top, block_arg = p.max(1)
        top, argtop = self.top_p[tile], self.argtop_t[tile]
        better = block_top > top
        argtop.copy_(torch.where(better, block_arg + start, argtop))
        top.copy_(torch.where(better, block_top, top))

    def _gather_target(self, out: Tensor, start: int, tile: slice, values: Tensor) -> None:
        if self.target is not None:
            column = self.target[tile] - start
            here = (column >= 0) & (column < values.shape[1])
            found = values.gather(1, column.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
            out.copy_(torch.where(here, found, out))

    def result(self, divergence: Tensor, top_s: Tensor, argtop_s: Tensor, lse_s: Tensor, shards: Shards) -> Tensor:
        """Returns `[len(TokenStats), R]`, given the student's largest logit, its token and the normaliser `[R]`."""
        # only one shard contains a target; the others add 0
        self.entropy_s, self.entropy_t, self.s_target, self.x_target = shards.sum(
            self.entropy_s, self.entropy_t, self.s_target, self.x_target
        )
        _, argtop_t = shards.select_at_global_argmax(self.top_p, self.argtop_t + shards.start)
        logprob = self.s_target - lse_s
        agree = argtop_s == argtop_t
        return stacked(divergence, self.entropy_s, self.entropy_t, logprob, self.x_target, top_s - lse_s, agree)


def stacked(divergence, entropy_s, entropy_t, logprob, x_target, top_logprob, agree) -> Tensor:
    """Returns rows' statistics in the order of `TokenStats`, `[len(TokenStats), R]`."""
    confidence, agree = top_logprob.exp(), agree.to(divergence.dtype)
    return torch.stack([divergence, entropy_s, entropy_t, logprob, logprob + x_target, confidence, agree])
