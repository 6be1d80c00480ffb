"""Tile kernels: logits are computed, used and forgotten on the chip.

A program owns BLOCK_M counted rows, taken from a list made on the device, and a span of the vocabulary. Rows that do
not count are in no program's list: no product, no copy. Partial sums have the layout of `rows.py`, which merges them.
"""

import triton
import triton.language as tl

from .logprobs import NUM_LOGPROB_OUT, NUM_LOGPROB_PARTS, logprob_gradient, scaled
from .rows import FAR, LOWEST, NUM_PARTS, NUM_SUMS, evaluate, gradient, load_bias, merged, prepare, put
from .terms import exp, expm1_parts


@triton.jit
def tile_rows(ROWS, COUNT, BLOCK_M: tl.constexpr):
    """This program's rows, and which of them are there."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = place < tl.load(COUNT)
    return tl.load(ROWS + place, mask=there, other=0).to(tl.int64), there


@triton.jit
def columns(V, first, BLOCK_N: tl.constexpr):
    """The columns of this program: [start, stop), of [first, V)."""
    tiles = tl.cdiv(tl.cdiv(V - first, BLOCK_N), tl.num_programs(1))
    start = first + tl.program_id(1) * tiles * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, V)


@triton.jit
def products(
    A, B, W, row, there, j, stop, stride_a, stride_b, stride_w, H, DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[row] @ W[j:].T in fp32, `[BLOCK_M, BLOCK_N]`, and unless DELTA is 0 (B - A)[row] @ W[j:].T, the difference
    taken in fp32 and, as DELTA says, rounded once or kept as the sum of two rounded parts. A W without a stride is a
    tensor descriptor: the GPU's copy engine (TMA) finds the addresses and fills what lies outside with zeros."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
        if DELTA > 0:
            b = tl.load(B + row[:, None] * stride_b + (k + lanes)[None, :], mask=mask, other=0.0)
            wide = b.to(tl.float32) - a.to(tl.float32)
            d = wide.to(a.dtype)
            acc_d = tl.dot(d, w, acc_d, input_precision=PRECISION)
            if DELTA == 2:
                acc_d = tl.dot((wide - d.to(tl.float32)).to(a.dtype), w, acc_d, input_precision=PRECISION)
    return acc, acc_d


@triton.jit
def tile_pair(
    tensors, row, there, j, stop, strides, H, H_T, scale, IS_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`rows.prepare` of a tile: s, t, d, `[BLOCK_M, BLOCK_N]`."""
    A, B, W, W_T, BIAS_S, BIAS_T = tensors
    s_a, s_b, s_w, s_w_t = strides
    if IS_DELTA:
        s, o = products(A, B, W, row, there, j, stop, s_a, s_b, s_w, H, IS_DELTA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    else:
        s, _ = products(A, A, W, row, there, j, stop, s_a, 0, s_w, H, 0, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        o, _ = products(B, B, W_T, row, there, j, stop, s_b, 0, s_w_t, H_T, 0, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    col = j + tl.arange(0, BLOCK_N)
    exists = col < stop
    bias_s, bias_t = None, None
    if BIAS_S is not None:
        bias_s, bias_t = load_bias(BIAS_S, col, exists)[None, :], load_bias(BIAS_T, col, exists)[None, :]
    return prepare(s, o, bias_s, bias_t, exists[None, :], scale, IS_DELTA)


@triton.jit
def rescale(m, z):
    """Online softmax over a tile's columns: new row maxima, factor on old sums, weights of z."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, exp(m - new), exp(z - new[:, None])


@triton.jit
def first_at(z, top, col):
    """The first column in which each row reaches `top`."""
    return tl.min(tl.where(z == top[:, None], col[None, :], 2147483647), 1)


@triton.jit
def tile_normalise(
    A, B, W, W_T, BIAS_S, BIAS_T, ROWS, COUNT, TARGETS, PARTS, TOPS, stride_a, stride_b, stride_w, stride_w_t,
    V, H, H_T, inv_t_s, inv_t_t, softcap, IS_DELTA: tl.constexpr, STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass: `rows.normalise` without logits in memory. TOPS, if any, gets each tile's largest probability under
    either model, relative to the columns this program has seen so far: no less than the true one."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    start, stop = columns(V, 0, BLOCK_N)
    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t, largest = m_s, m_s
    a_s = tl.zeros([BLOCK_M], tl.float32)
    a_t, b_e, b_d, d0, at_s, at_t = a_s, a_s, a_s, a_s, a_s, a_s
    top_s = tl.zeros([BLOCK_M], tl.int32)
    top_t = top_s
    if TARGETS is not None:
        target = tl.load(TARGETS + row, mask=there, other=-1).to(tl.int64)
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        s, t, d = tile_pair(
            (A, B, W, W_T, BIAS_S, BIAS_T), row, there, j, stop, (stride_a, stride_b, stride_w, stride_w_t), H, H_T,
            (inv_t_s, inv_t_t, softcap), IS_DELTA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
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
        m_new, shrink, w_t = rescale(m_t, t)
        if STATS:
            top_t = tl.where(m_new > m_t, first_at(t, m_new, col), top_t)
        m_t = m_new
        a_t = a_t * shrink + tl.sum(w_t, 1)
        if TOPS is not None:
            place = tl.program_id(0) * tl.cdiv(V, BLOCK_N) + j // BLOCK_N
            share = tl.maximum(w / a_s[:, None], w_t / a_t[:, None])
            tl.store(TOPS + place, tl.max(tl.where(there[:, None], share, 0.0)))
        if TARGETS is not None:
            hit = col[None, :] == target[:, None]
            at_s += tl.sum(tl.where(hit, s, 0.0), 1)
            at_t += tl.sum(tl.where(hit, t, 0.0), 1)
    P = PARTS + (row * tl.num_programs(1) + tl.program_id(1)) * NUM_PARTS
    put(P, (m_s, a_s, b_e, b_d, m_t, a_t, largest, d0, at_s, at_t), there)
    if STATS:
        put((P + 10).to(tl.pointer_type(tl.int32), bitcast=True), (top_s, top_t), there)
        put(P + 12, (m_s, m_t), there)


@triton.jit(do_not_specialize=["sum_place"])  # it counts the blocks of a call, each else a kernel of its own
def tile_accumulate(
    A, B, W, W_T, G, BIAS_S, BIAS_T, ROWS, COUNT, WEIGHT, PARTS, SUMS, TOPS, stride_a, stride_b, stride_w, stride_w_t,
    stride_g, stride_top, first, sum_place, V, H, H_T, inv_t_s, inv_t_t, softcap, entry_clip, token_clip, slope,
    grad_scale, grad_filter, TOP_M: tl.constexpr, TOP_N: tl.constexpr,
    TERM: tl.constexpr, BETA: tl.constexpr, SUM_U: tl.constexpr, PHASE: tl.constexpr, IS_DELTA: tl.constexpr,
    STATS: tl.constexpr, SPLITS: tl.constexpr, SUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass, over the columns [first, V): recomputes tiles and, as in `rows.accumulate`, adds up the divergence
    or writes these columns' gradient to G, or both. G's first column is `first`; the program's sums go to place
    `sum_place + program_id(1)` of SUM_SPLITS. TOPS is of the first pass's tiles, TOP_M x TOP_N: where it is at most
    `grad_filter`, nothing is done."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    start, stop = columns(V, first, BLOCK_N)
    own = tl.where(there, row, tl.load(ROWS).to(tl.int64))  # a row that is not there reads a counted one's parts
    lse_s, lse_t, c, mean_d, _ = merged(PARTS + (own[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]) * NUM_PARTS, 1)
    loss = tl.zeros([BLOCK_M], tl.float32)
    clipped_loss, total_u, lost_q, entropy_s, entropy_t, sum_u, lost = loss, loss, loss, loss, loss, loss, loss
    factor = loss + inv_t_s * grad_scale
    if WEIGHT is not None and PHASE != "sum":
        factor *= tl.load(WEIGHT + row, mask=there, other=0.0).to(tl.float32)
    if PHASE == "both" and SUM_U == "mean":
        sum_u = c - mean_d
    if PHASE == "grad":
        R = SUMS + (own[:, None] * SUM_SPLITS + tl.arange(0, SUM_SPLITS)[None, :]) * NUM_SUMS
        sum_u = tl.sum(tl.load(R + 2), 1)
        if entry_clip is not None:
            lost = tl.sum(tl.load(R + 3), 1)
        if token_clip is not None:
            factor = tl.where(tl.sum(tl.load(R + 1), 1) <= token_clip, factor, 0.0)
    for j in range(start, stop, BLOCK_N):
        wanted = True
        if TOPS is not None:
            top = TOPS + tl.program_id(0) * BLOCK_M // TOP_M * stride_top + j // TOP_N
            wanted = tl.load(top) > grad_filter
        if wanted:
            col = j + tl.arange(0, BLOCK_N)
            exists = (col < stop)[None, :]
            s, t, d = tile_pair(
                (A, B, W, W_T, BIAS_S, BIAS_T), row, there, j, stop, (stride_a, stride_b, stride_w, stride_w_t),
                H, H_T, (inv_t_s, inv_t_t, softcap), IS_DELTA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            p, q, l, u, bounded, clipped, k_q = evaluate(
                s, t, d, lse_s[:, None], lse_t[:, None], c[:, None], exists, entry_clip, slope, TERM, BETA, False
            )  # fmt: skip
            if PHASE != "sum":
                g = gradient(
                    s, q, u, k_q, clipped, sum_u[:, None], lost[:, None], entry_clip, inv_t_s, softcap, exists
                )  # fmt: skip
                g = (g * factor[:, None]).to(G.dtype.element_ty)
                tl.store(G + row[:, None] * stride_g + (col - first)[None, :], g, mask=there[:, None] & exists)
            if PHASE != "grad":
                loss += tl.sum(l, 1)
                total_u += tl.sum(u, 1)
                if entry_clip is not None:
                    clipped_loss += tl.sum(bounded, 1)
                    lost_q += tl.sum(tl.where(clipped, q, 0.0), 1)
                if STATS:
                    entropy_s += tl.sum(tl.where(q > 0, q * (lse_s[:, None] - s), 0.0), 1)
                    entropy_t += tl.sum(tl.where(p > 0, p * (lse_t[:, None] - t), 0.0), 1)
    if PHASE != "grad":
        R = SUMS + (row * SUM_SPLITS + sum_place + tl.program_id(1)) * NUM_SUMS
        clipped_loss = clipped_loss if entry_clip is not None else loss
        put(R, (loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t), there)


@triton.jit
def tile_scores(
    A, W, BIAS, ROWS, COUNT, TARGETS, PARTS, G, WEIGHT, OUT, stride_a, stride_w, stride_g, first, V, H, inv_t, softcap,
    grad_scale, GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One model. First pass: `logprobs.normalise_one`. With GRAD, of the columns [first, V), the gradient of
    log q[target], by the normalisers in OUT."""
    if tl.program_id(0) * BLOCK_M >= tl.load(COUNT):
        return
    row, there = tile_rows(ROWS, COUNT, BLOCK_M)
    start, stop = columns(V, first, BLOCK_N)
    target = tl.load(TARGETS + row, mask=there, other=-1)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    b, s0, at = a, a, a
    if GRAD:
        lse = tl.load(OUT + row * NUM_LOGPROB_OUT + 3, mask=there, other=0.0)
        factor = a + inv_t * grad_scale
        if WEIGHT is not None:
            factor *= tl.load(WEIGHT + row, mask=there, other=0.0).to(tl.float32)
    for j in range(start, stop, BLOCK_N):
        col = j + tl.arange(0, BLOCK_N)
        exists = col < stop
        s, _ = products(A, A, W, row, there, j, stop, stride_a, 0, stride_w, H, 0, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        bias = None
        if BIAS is not None:
            bias = load_bias(BIAS, col, exists)[None, :]
        s = scaled(s, bias, exists[None, :], inv_t, softcap)
        hit = col[None, :] == target[:, None]
        if GRAD:
            g = logprob_gradient(s, lse[:, None], hit, exists[None, :], inv_t, softcap) * factor[:, None]
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
        put(P, (m, a, b, s0, at), there)
