"""The tile kernel computes logits and their statistics without writing logits to memory.

A program processes BLOCK_M unmasked rows, from a list of indices on the device, and a span of the vocabulary. Masked
rows are not in the list and cost nothing. Partial sums have the layout of `logprobs.normalise_one`.
"""

import triton
import triton.language as tl

from .logprobs import NUM_LOGPROB_PARTS, raw, scaled, store_parts
from .rows import LOWEST, load_bias
from .terms import exp


@triton.jit
def tile_rows(ROWS, COUNT, BLOCK_M: tl.constexpr):
    """Returns this program's row indices, and a mask of the valid ones."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = place < tl.load(COUNT)
    return tl.load(ROWS + place, mask=there, other=0).to(tl.int64), there


@triton.jit
def columns(V, BLOCK_N: tl.constexpr):
    """Returns this program's columns, [start, stop) of [0, V)."""
    tiles = tl.cdiv(tl.cdiv(V, BLOCK_N), tl.num_programs(1))
    start = tl.program_id(1) * tiles * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, V)


@triton.jit
def product(
    A, W, row, there, j, stop, stride_a, stride_w, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns A[row] @ W[j:].T in fp32, `[BLOCK_M, BLOCK_N]`.

    If `stride_w` is None, W is a tensor descriptor: the GPU's copy engine (TMA) computes the addresses and fills
    entries out of bounds with zeros.
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
    """One step of online softmax over a tile. Returns new row maxima, the factor on old sums, and the weights of z."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, exp(m - new), exp(z - new[:, None])


@triton.jit
def tile_scores(
    A, W, BIAS, ROWS, COUNT, TARGETS, PARTS, stride_a, stride_w, V, H, inv_t, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`logprobs.normalise_one` for the unmasked rows, without logits in memory."""
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
        s = scaled(raw(s, bias), exists[None, :], inv_t, softcap)
        hit = col[None, :] == target[:, None]
        m_new, shrink, w = rescale(m, s)
        if j == start:
            s0 = tl.where(m_new == LOWEST, 0.0, m_new)  # 0 where the tile's entries are all excluded
        m = m_new
        a = a * shrink + tl.sum(w, 1)
        b = b * shrink + tl.sum(tl.where(w > 0, w * (s - s0[:, None]), 0.0), 1)
        at += tl.sum(tl.where(hit, s, 0.0), 1)
    P = PARTS + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_LOGPROB_PARTS
    store_parts(P, m, a, b, s0, at, there)
