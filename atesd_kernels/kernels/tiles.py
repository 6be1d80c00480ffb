"""The tile kernel: logits are computed, used and forgotten on the chip.

A program owns BLOCK_M counted rows, taken from a list made on the device, and a span of the vocabulary. Rows that do
not count are in no program's list: no product, no copy. Partial sums have the layout of `logprobs.normalise_one`.
"""

import triton
import triton.language as tl

from .logprobs import NUM_LOGPROB_PARTS, scaled
from .rows import LOWEST, load_bias, put
from .terms import exp


@triton.jit
def tile_rows(ROWS, COUNT, BLOCK_M: tl.constexpr):
    """This program's rows, and which of them are there."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = place < tl.load(COUNT)
    return tl.load(ROWS + place, mask=there, other=0).to(tl.int64), there


@triton.jit
def columns(V, BLOCK_N: tl.constexpr):
    """The columns of this program: [start, stop) of [0, V)."""
    tiles = tl.cdiv(tl.cdiv(V, BLOCK_N), tl.num_programs(1))
    start = tl.program_id(1) * tiles * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, V)


@triton.jit
def product(
    A, W, row, there, j, stop, stride_a, stride_w, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[row] @ W[j:].T in fp32, `[BLOCK_M, BLOCK_N]`.

    A W without a stride is a tensor descriptor: the GPU's copy engine (TMA) finds the addresses and fills what lies
    outside with zeros.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    col = j + tl.arange(0, BLOCK_N)
    if stride_w is not None:
        W += col.to(tl.int64)[None, :] * stride_w
    for k in range(0, H, BLOCK_K):
        inside = k + lanes < H
        mask = there[:, None] & inside[None, :]
        a = tl.load(A + row[:, None] * stride_a + (k + lanes)[None, :], mask=mask, other=0.0)
        if stride_w is None:
            w = W.load([j, k]).T
        else:
            w = tl.load(W + (k + lanes)[:, None], mask=(col < stop)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rescale(m, z):
    """Online softmax over a tile's columns: new row maxima, factor on old sums, weights of z."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, exp(m - new), exp(z - new[:, None])


@triton.jit
def tile_scores(
    A, W, BIAS, ROWS, COUNT, TARGETS, PARTS, stride_a, stride_w, V, H, inv_t, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`logprobs.normalise_one` of the counted rows, without logits in memory."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    start, stop = columns(V, BLOCK_N)
    target = tl.load(TARGETS + row, mask=there, other=-1)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    b, s0, at = a, a, a
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        exists = col < stop
        s = product(A, W, row, there, j, stop, stride_a, stride_w, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        bias = None
        if BIAS is not None:
            bias = load_bias(BIAS, col, exists)[None, :]
        s = scaled(s, bias, exists[None, :], inv_t, softcap)
        hit = col[None, :] == target[:, None]
        m_new, shrink, w = rescale(m, s)
        if j == start:
            s0 = m_new
        m = m_new
        a = a * shrink + tl.sum(w, 1)
        b = b * shrink + tl.sum(tl.where(w > 0, w * (s - s0[:, None]), 0.0), 1)
        at += tl.sum(tl.where(hit, s, 0.0), 1)
    P = PARTS + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_LOGPROB_PARTS
    put(P, (m, a, b, s0, at), there)
