"""Tile kernels: logits are computed, used and forgotten on the chip.

A program owns BLOCK_M counted rows, taken from a list made on the device, and a span of the vocabulary. Rows that do
not count are in no program's list: no product, no copy. Partial sums have the layout of `rows.py`, which merges them.
"""

import triton
import triton.language as tl

from .logprobs import NUM_LOGPROB_OUT, NUM_LOGPROB_PARTS, scaled
from .rows import FAR, LOWEST, NUM_PARTS, NUM_SUMS, evaluate, gradient, merged, prepare
from .terms import expm1_parts


@triton.jit
def tile_rows(ROWS, COUNT, BLOCK_M: tl.constexpr):
    """This program's rows, and which of them are there."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = place < tl.load(COUNT)
    return tl.load(ROWS + place, mask=there, other=0).to(tl.int64), there


@triton.jit
def product(
    A, W, row, there, col, exists, stride_a, stride_w, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[row] @ W[col].T, fp32: `[BLOCK_M, BLOCK_N]`."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    A += row[:, None] * stride_a
    W += col.to(tl.int64)[None, :] * stride_w
    for k in range(0, H, BLOCK_K):
        inside = k + lanes < H
        a = tl.load(A + (k + lanes)[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        w = tl.load(W + (k + lanes)[:, None], mask=exists[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_and_difference(
    A, B, W, row, there, col, exists, stride_a, stride_b, stride_w, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[row] @ W[col].T and (B - A)[row] @ W[col].T, the difference taken in fp32 and rounded once."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    A += row[:, None] * stride_a
    B += row[:, None] * stride_b
    W += col.to(tl.int64)[None, :] * stride_w
    for k in range(0, H, BLOCK_K):
        inside = k + lanes < H
        a = tl.load(A + (k + lanes)[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.load(B + (k + lanes)[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        w = tl.load(W + (k + lanes)[:, None], mask=exists[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        acc_d = tl.dot((b.to(tl.float32) - a.to(tl.float32)).to(a.dtype), w, acc_d, input_precision=PRECISION)
    return acc, acc_d


@triton.jit
def tile_pair(
    A, B, W, W_T, BIAS_S, BIAS_T, row, there, col, stop, stride_a, stride_b, stride_w, stride_w_t, H, H_T,
    inv_t_s, inv_t_t, softcap, IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`rows.prepare` of a tile: s, t, d, `[BLOCK_M, BLOCK_N]`."""
    exists = col < stop
    if IS_DELTA:
        s, o = product_and_difference(
            A, B, W, row, there, col, exists, stride_a, stride_b, stride_w, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
    else:
        s = product(A, W, row, there, col, exists, stride_a, stride_w, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        o = product(B, W_T, row, there, col, exists, stride_b, stride_w_t, H_T, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    bias_s, bias_t = 0.0, 0.0
    if HAS_BIAS:
        bias_s = tl.load(BIAS_S + col, mask=exists, other=0.0).to(tl.float32)[None, :]
        bias_t = tl.load(BIAS_T + col, mask=exists, other=0.0).to(tl.float32)[None, :]
    return prepare(
        s, o, bias_s, bias_t, exists[None, :], inv_t_s, inv_t_t, softcap, IS_DELTA, HAS_BIAS, HAS_SOFTCAP,
        HAS_TEMPERATURE,
    )  # fmt: skip


@triton.jit
def rescale(m, z):
    """Online softmax over a tile's columns: new row maxima, factor on old sums, weights of z."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, tl.exp(m - new), tl.exp(z - new[:, None])


@triton.jit
def first_at(z, top, col):
    """The first column in which each row reaches `top`."""
    return tl.min(tl.where(z == top[:, None], col[None, :], 2147483647), 1)


@triton.jit
def tile_normalise(
    A, B, W, W_T, BIAS_S, BIAS_T, ROWS, COUNT, TARGETS, PARTS, stride_a, stride_b, stride_w, stride_w_t, V, H, H_T,
    inv_t_s, inv_t_t, softcap, IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_TARGETS: tl.constexpr, STATS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass: `rows.normalise` without logits in memory."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    tiles = tl.cdiv(tl.cdiv(V, BLOCK_N), tl.num_programs(1))
    start = tl.program_id(1) * tiles * BLOCK_N
    stop = tl.minimum(start + tiles * BLOCK_N, V)
    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t, largest = m_s, m_s
    a_s = tl.zeros([BLOCK_M], tl.float32)
    a_t, b_e, b_d, d0, at_s, at_t = a_s, a_s, a_s, a_s, a_s, a_s
    top_s = tl.zeros([BLOCK_M], tl.int32)
    top_t = top_s
    target = tl.zeros([BLOCK_M], tl.int64)
    if HAS_TARGETS:
        target = tl.load(TARGETS + row, mask=there, other=-1).to(tl.int64)
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        s, t, d = tile_pair(
            A, B, W, W_T, BIAS_S, BIAS_T, row, there, col, stop, stride_a, stride_b, stride_w, stride_w_t, H, H_T,
            inv_t_s, inv_t_t, softcap, IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION,
        )  # fmt: skip
        m_new, shrink, w = rescale(m_s, s)
        if STATS:
            top_s = tl.where(m_new > m_s, first_at(s, m_new, col), top_s)
        m_s = m_new
        if j == start:
            # d0 near the mean of d under q, as in `rows.reference_difference`
            finite = (w > 0) & (tl.abs(d) < FAR)
            total = tl.sum(tl.where(finite, w, 0.0), 1)
            d0 = tl.sum(tl.where(finite, w * d, 0.0), 1) / tl.where(total > 0, total, 1.0)
        d -= d0[:, None]
        largest = tl.maximum(largest, tl.max(d, 1))
        a_s = a_s * shrink + tl.sum(w, 1)
        b_e = b_e * shrink + tl.sum(w * expm1_parts(d)[0], 1)
        b_d = b_d * shrink + tl.sum(tl.where(w > 0, w * d, 0.0), 1)
        m_new, shrink, w = rescale(m_t, t)
        if STATS:
            top_t = tl.where(m_new > m_t, first_at(t, m_new, col), top_t)
        m_t = m_new
        a_t = a_t * shrink + tl.sum(w, 1)
        if HAS_TARGETS:
            hit = col[None, :] == target[:, None]
            at_s += tl.sum(tl.where(hit, s, 0.0), 1)
            at_t += tl.sum(tl.where(hit, t, 0.0), 1)
    P = PARTS + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_PARTS
    tl.store(P, m_s, mask=there)
    tl.store(P + 1, a_s, mask=there)
    tl.store(P + 2, b_e, mask=there)
    tl.store(P + 3, b_d, mask=there)
    tl.store(P + 4, m_t, mask=there)
    tl.store(P + 5, a_t, mask=there)
    tl.store(P + 6, largest, mask=there)
    tl.store(P + 7, d0, mask=there)
    if HAS_TARGETS:
        tl.store(P + 8, at_s, mask=there)
        tl.store(P + 9, at_t, mask=there)
    if STATS:
        tl.store((P + 10).to(tl.pointer_type(tl.int32), bitcast=True), top_s, mask=there)
        tl.store((P + 11).to(tl.pointer_type(tl.int32), bitcast=True), top_t, mask=there)


@triton.jit
def tile_accumulate(
    A, B, W, W_T, G, BIAS_S, BIAS_T, ROWS, COUNT, WEIGHT, PARTS, SUMS, stride_a, stride_b, stride_w, stride_w_t,
    stride_g, first, sum_place, V, H, H_T, inv_t_s, inv_t_t, softcap, entry_clip, token_clip, slope, grad_scale,
    TERM: tl.constexpr, BETA: tl.constexpr, SUM_U: tl.constexpr, PHASE: tl.constexpr, IS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_ENTRY_CLIP: tl.constexpr, HAS_TOKEN_CLIP: tl.constexpr, STATS: tl.constexpr, SPLITS: tl.constexpr,
    SUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass, over the columns [first, V): recomputes tiles and, as in `rows.accumulate`, adds up the divergence
    or writes these columns' gradient to G, or both. G's first column is `first`; the program's sums go to place
    `sum_place + program_id(1)` of SUM_SPLITS."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    tiles = tl.cdiv(tl.cdiv(V - first, BLOCK_N), tl.num_programs(1))
    start = first + tl.program_id(1) * tiles * BLOCK_N
    stop = tl.minimum(start + tiles * BLOCK_N, V)
    own = tl.where(there, row, tl.load(ROWS).to(tl.int64))  # a row that is not there reads a counted one's parts
    lse_s, lse_t, c, mean_d = merged(PARTS + (own[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]) * NUM_PARTS, 1)
    loss = tl.zeros([BLOCK_M], tl.float32)
    clipped_loss, total_u, lost_q, entropy_s, entropy_t, sum_u, lost = loss, loss, loss, loss, loss, loss, loss
    factor = loss + inv_t_s * grad_scale
    if HAS_WEIGHT and PHASE != "sum":
        factor *= tl.load(WEIGHT + row, mask=there, other=0.0).to(tl.float32)
    if PHASE == "both" and SUM_U == "mean":
        sum_u = c - mean_d
    if PHASE == "grad":
        lanes = tl.arange(0, SUM_SPLITS)
        R = SUMS + (own[:, None] * SUM_SPLITS + lanes[None, :]) * NUM_SUMS
        sum_u = tl.sum(tl.load(R + 2), 1)
        if HAS_ENTRY_CLIP:
            lost = tl.sum(tl.load(R + 3), 1)
        if HAS_TOKEN_CLIP:
            factor = tl.where(tl.sum(tl.load(R + 1), 1) <= token_clip, factor, 0.0)
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        exists = (col < stop)[None, :]
        s, t, d = tile_pair(
            A, B, W, W_T, BIAS_S, BIAS_T, row, there, col, stop, stride_a, stride_b, stride_w, stride_w_t, H, H_T,
            inv_t_s, inv_t_t, softcap, IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION,
        )  # fmt: skip
        p, q, l, u, plain, clipped, k_q = evaluate(
            s, t, d, lse_s[:, None], lse_t[:, None], c[:, None], exists, entry_clip, slope, TERM, BETA, HAS_ENTRY_CLIP
        )
        if PHASE != "sum":
            g = gradient(
                s, q, u, k_q, clipped, sum_u[:, None], lost[:, None], inv_t_s, softcap, exists,
                HAS_ENTRY_CLIP, HAS_SOFTCAP,
            )  # fmt: skip
            g = (g * factor[:, None]).to(G.dtype.element_ty)
            tl.store(G + row[:, None] * stride_g + (col - first)[None, :], g, mask=there[:, None] & exists)
        if PHASE != "grad":
            loss += tl.sum(l, 1)
            total_u += tl.sum(u, 1)
            if HAS_ENTRY_CLIP:
                clipped_loss += tl.sum(plain, 1)
                lost_q += tl.sum(tl.where(clipped, q, 0.0), 1)
            if STATS:
                entropy_s += tl.sum(tl.where(q > 0, q * (lse_s[:, None] - s), 0.0), 1)
                entropy_t += tl.sum(tl.where(p > 0, p * (lse_t[:, None] - t), 0.0), 1)
    if PHASE != "grad":
        R = SUMS + (row * SUM_SPLITS + sum_place + tl.program_id(1)) * NUM_SUMS
        tl.store(R, loss, mask=there)
        tl.store(R + 1, clipped_loss if HAS_ENTRY_CLIP else loss, mask=there)
        tl.store(R + 2, total_u, mask=there)
        tl.store(R + 3, lost_q, mask=there)
        tl.store(R + 4, entropy_s, mask=there)
        tl.store(R + 5, entropy_t, mask=there)


@triton.jit
def tile_scores(
    A, W, BIAS, ROWS, COUNT, TARGETS, PARTS, G, WEIGHT, OUT, stride_a, stride_w, stride_g, first, V, H, inv_t, softcap,
    grad_scale, GRAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One model. First pass: `logprobs.normalise_one`. With GRAD, of the columns [first, V), the gradient of
    log q[target], by the normalisers in OUT."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    tiles = tl.cdiv(tl.cdiv(V - first, BLOCK_N), tl.num_programs(1))
    start = first + tl.program_id(1) * tiles * BLOCK_N
    stop = tl.minimum(start + tiles * BLOCK_N, V)
    target = tl.load(TARGETS + row, mask=there, other=-1)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    b, s0, at = a, a, a
    if GRAD:
        lse = tl.load(OUT + row * NUM_LOGPROB_OUT + 3, mask=there, other=0.0)
        factor = a + inv_t * grad_scale
        if HAS_WEIGHT:
            factor *= tl.load(WEIGHT + row, mask=there, other=0.0).to(tl.float32)
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        exists = col < stop
        s = product(A, W, row, there, col, exists, stride_a, stride_w, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(BIAS + col, mask=exists, other=0.0).to(tl.float32)[None, :]
        s = scaled(s, bias, exists[None, :], inv_t, softcap, HAS_SOFTCAP)
        hit = col[None, :] == target[:, None]
        if GRAD:
            g = (tl.where(hit, 1.0, 0.0) - tl.exp(s - lse[:, None])) * factor[:, None]
            if HAS_SOFTCAP:
                tanh_s = s / (inv_t * softcap)
                g *= tl.where(exists[None, :], 1 - tanh_s * tanh_s, 0.0)
            place = G + row[:, None] * stride_g + (col - first)[None, :]
            tl.store(place, g.to(G.dtype.element_ty), mask=there[:, None] & exists[None, :])
        else:
            m_new, shrink, w = rescale(m, s)
            if j == start:
                s0 = m_new
            m = m_new
            a = a * shrink + tl.sum(w, 1)
            b = b * shrink + tl.sum(tl.where(w > 0, w * (s - s0[:, None]), 0.0), 1)
            at += tl.sum(tl.where(hit, s, 0.0), 1)
    if not GRAD:
        P = PARTS + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_LOGPROB_PARTS
        tl.store(P, m, mask=there)
        tl.store(P + 1, a, mask=there)
        tl.store(P + 2, b, mask=there)
        tl.store(P + 3, s0, mask=there)
        tl.store(P + 4, at, mask=there)
