"""The kernel that mixes the logits of a teacher's views, one view after another."""

import triton
import triton.language as tl

from .terms import capped_difference


@triton.jit
def add_view(
    O, S, P, MIX, BIAS_S, SHIFT, stride_o, stride_s, stride_p, V, softcap,
    IS_DELTA: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds MIX times a view's capped logits minus the student's to O; the first view overwrites it.

    P has the view's logits, or with IS_DELTA their difference from the student's S.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = cols < V
    s = tl.load(S + row * stride_s + cols, mask=exists, other=0.0)
    d = tl.load(P + row * stride_p + cols, mask=exists, other=0.0)
    if not IS_DELTA:
        d = d - s
    d = d.to(tl.float32)
    if SHIFT is not None:
        d += tl.load(SHIFT + cols, mask=exists, other=0.0)
    if softcap is not None:
        z = s.to(tl.float32)
        if BIAS_S is not None:
            z += tl.load(BIAS_S + cols, mask=exists, other=0.0)
        d = capped_difference(z, z + d, d, softcap)
    d *= tl.load(MIX + row)
    O += row * stride_o + cols
    if not FIRST:
        d += tl.load(O, mask=exists, other=0.0)
    tl.store(O, d, mask=exists)
