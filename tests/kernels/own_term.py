"""The Triton function of `shard_cases.squared`. Separate because only machines with Triton import it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squared(x, p, q, near, e, bend, BETA: tl.constexpr):
    difference = tl.where(near, q * e, p - q)
    return difference * difference, -2 * difference * q
