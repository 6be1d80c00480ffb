"""Passes that torch does slowly on a GPU: fill rows with values, multiply by a scalar on the device, mix logits."""

import triton
import triton.language as tl

from .terms import capped_difference


@triton.jit
def fill_rows(OUT, VALUES, stride, V, BLOCK: tl.constexpr):
    """Stores VALUES[i] in OUT[i, :V]."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float32) + tl.load(VALUES + row).to(tl.float32)
    tl.store(OUT + row * stride + cols, value.to(OUT.dtype.element_ty), mask=cols < V)


@triton.jit
def scale(X, FACTOR, numel, BLOCK: tl.constexpr):
    """Multiplies X by FACTOR in place, in fp32. A factor of 1 is a no-op."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + place, mask=place < numel).to(tl.float32) * factor
        tl.store(X + place, x.to(X.dtype.element_ty), mask=place < numel)


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
