"""Row kernels over logits in memory: normalisers, sums of a divergence, gradient.

`num_programs(1)` programs share a row: one if there are many rows, else several. Each writes its partial sums, and the
next kernel adds them in a fixed order, so results do not depend on scheduling. Accumulators are vectors, one element
per lane, reduced after the loop. An unused option (bias, mask, weight, softcap, clip) is None and compiles to no code.

Arithmetic costs as much as memory traffic here. On an H200, where a copy moves 4.2 TB/s, a forward KL's kernels (36
instructions an entry) moved 3.35 and a JSD's (90 then) 2.5 (`python -m bench.gpu --stages 4`). This is why there are a
plain case (shared head, no bias, no softcap), bounded rows and our own `exp`.
"""

import triton
import triton.language as tl

from .terms import capped, capped_difference, capped_slope, exp, expm1_parts, log1p_parts

LOWEST = tl.constexpr(-3.0e38)  # replaces -inf, because -inf - -inf is NaN
FAR = tl.constexpr(40.0)  # above this log p - log q, a sum under q may lose the teacher's mass
CAPPED_DELTA = tl.constexpr(3)  # IS_DELTA if O is the difference of capped logits
HIGH = tl.constexpr(30.0)  # a logit may exceed the reference of the exponentials by this: e^(HIGH + FAR) is finite

# Positions of a program's partial results in PARTS, which `normalise` stores. w = exp(s - MAX_S).
MAX_S = tl.constexpr(0)
SUM_S = tl.constexpr(1)  # sum w
SUM_E = tl.constexpr(2)  # sum w expm1(d - D0)
SUM_D = tl.constexpr(3)  # sum w (d - D0)
MAX_T = tl.constexpr(4)
SUM_T = tl.constexpr(5)  # sum exp(t - MAX_T)
LARGEST_D = tl.constexpr(6)  # max d - D0
D0 = tl.constexpr(7)
TARGET_S = tl.constexpr(8)  # logits of the target, 0 if another program has it
TARGET_T = tl.constexpr(9)
COLUMN_S = tl.constexpr(10)  # int32: the columns of the largest s and t
COLUMN_T = tl.constexpr(11)
TOP_S = tl.constexpr(12)  # largest s and t; MAX_S and MAX_T need not be
TOP_T = tl.constexpr(13)
NUM_PARTS = tl.constexpr(16)
# Positions in SUMS, which `accumulate` stores.
LOSS = tl.constexpr(0)  # sum l'
CLIPPED_LOSS = tl.constexpr(1)
TOTAL_U = tl.constexpr(2)  # sum u' of unclipped entries
LOST_Q = tl.constexpr(3)  # sum q of clipped entries
ENTROPY_S = tl.constexpr(4)
ENTROPY_T = tl.constexpr(5)
NUM_SUMS = tl.constexpr(8)
# Positions in STATS_OUT, which `finish_stats` stores.
CONFIDENCE = tl.constexpr(0)
AGREE = tl.constexpr(1)
LOGPROB_S = tl.constexpr(2)
LOGPROB_T = tl.constexpr(3)
NUM_ROW_STATS = tl.constexpr(4)


@triton.jit
def span(V, BLOCK: tl.constexpr):
    """Returns this program's columns, [start, stop)."""
    blocks = tl.cdiv(tl.cdiv(V, BLOCK), tl.num_programs(1))
    start = tl.program_id(1) * blocks * BLOCK
    return start, tl.minimum(start + blocks * BLOCK, V)


@triton.jit
def store_at(P, positions, values, mask):
    """Stores values[i] at P + positions[i]."""
    tl.static_assert(len(positions) == len(values))
    for i in tl.static_range(len(values)):
        tl.store(P + positions[i], values[i], mask=mask)


@triton.jit
def prepare(s, o, bias_s, bias_t, exists, scale, IS_DELTA: tl.constexpr):
    """Returns scaled logits s, t and d = t - s in fp32, from raw student logits and raw differences or teacher logits,
    and the softcap's derivative at s. With CAPPED_DELTA the differences are those of capped logits.

    d comes from the raw difference, not from two rounded logits. s = t = -inf and d = 0 where `exists` is false and
    where both models exclude the entry. `scale` is (1 / T_s, 1 / T_t, softcap or None).
    """
    inv_t_s, inv_t_t, softcap = scale
    if IS_DELTA == CAPPED_DELTA:
        d = o.to(tl.float32)
        t = s.to(tl.float32)
    elif IS_DELTA:
        d = o.to(tl.float32)
        t = s.to(tl.float32) + d
    else:
        d = (o - s).to(tl.float32)
        t = o.to(tl.float32)
    s = s.to(tl.float32)
    if bias_s is not None:
        s += bias_s
        t += bias_t
        d += tl.where(bias_t == bias_s, 0.0, bias_t - bias_s)
    slope = 1.0
    if softcap is not None:
        slope = capped_slope(s, softcap)
        if IS_DELTA != CAPPED_DELTA:
            d = capped_difference(s, t, d, softcap)
        s, t = capped(s, softcap), capped(t, softcap)
        if IS_DELTA == CAPPED_DELTA:
            t += o.to(tl.float32)
    d = d * inv_t_t + s * (inv_t_t - inv_t_s)
    s, t = tl.where(exists, s * inv_t_s, -float("inf")), tl.where(exists, t * inv_t_t, -float("inf"))
    if IS_DELTA and bias_s is None:  # d is finite: it was loaded as 0 where `exists` is false
        return s, t, d, slope
    one_sided = (s == -float("inf")) | (t == -float("inf"))
    return s, t, tl.where(one_sided, tl.where(s == t, 0.0, t - s), d), slope


@triton.jit
def load_bias(BIAS, cols, exists):
    """Returns the bias in fp32, or None."""
    if BIAS is None:
        return  # None; triton 3.6 compiles this form only
    else:
        return tl.load(BIAS + cols, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_pair(S, O, BIAS_S, BIAS_T, cols, exists, scale, IS_DELTA: tl.constexpr):
    """Loads logits and biases and returns `prepare`'s s, t, d, slope. S and O point at the row's start."""
    s = tl.load(S + cols, mask=exists, other=0.0)
    o = tl.load(O + cols, mask=exists, other=0.0)
    return prepare(
        s, o, load_bias(BIAS_S, cols, exists), load_bias(BIAS_T, cols, exists), exists, scale, IS_DELTA
    )  # fmt: skip


@triton.jit
def online_softmax_step(m, z):
    """One step of online softmax. Returns the new maximum, the factor on old sums, the weight of z, and z > m."""
    up = z > m
    shrink = exp(-tl.abs(z - m))
    return tl.where(up, z, m), tl.where(up, shrink, 1.0), tl.where(up, 1.0, shrink), up


@triton.jit
def reference_difference(s, d):
    """Returns d0, near the mean of d under q, estimated from one block. Sums of d - d0 then lose no digits."""
    top = tl.maximum(tl.max(s, 0), LOWEST)
    w = tl.where(tl.abs(d) < FAR, exp(s - top), 0.0)
    total = tl.sum(w, 0)
    d0 = tl.sum(tl.where(w > 0, w * d, 0.0), 0) / tl.where(total > 0, total, 1.0)
    return tl.where(tl.abs(d0) < FAR, d0, 0.0)


@triton.jit
def plain_sums(S, O, start, stop, scale, reference, d0, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """The first sweep for finite s and d. Exponentials are relative to a fixed `reference`, so there is no running
    maximum. Returns the largest s, the largest d - d0, the sums of w = exp(s - reference), w expm1(d - d0) and
    w (d - d0), and with STATS the columns of the largest s and t, and the largest t."""
    lanes = tl.arange(0, BLOCK)
    top_s = tl.full([BLOCK], LOWEST, tl.float32)
    top_t, largest = top_s, top_s
    a, b_e, b_d = (tl.zeros([BLOCK], tl.float32),) * 3
    column_s, column_t = (tl.zeros([BLOCK], tl.int32),) * 2
    for j in range(start, stop, BLOCK):
        cols = j + lanes
        s, t, d, _ = load_pair(S, O, None, None, cols, cols < stop, scale, 1)
        d -= d0
        w = exp(s - reference)
        a += w
        b_e += w * expm1_parts(d)[0]
        b_d += w * d
        largest = tl.maximum(largest, d)
        if STATS:
            column_s = tl.where(s > top_s, cols, column_s)
            column_t = tl.where(t > top_t, cols, column_t)
            top_t = tl.maximum(top_t, t)
        top_s = tl.maximum(top_s, s)
    high_s, high_t = tl.max(top_s, 0), tl.max(top_t, 0)
    if STATS:
        column_s = tl.where(top_s == high_s, column_s, 2147483647)
        column_t = tl.where(top_t == high_t, column_t, 2147483647)
    sums = (tl.sum(a, 0), tl.sum(b_e, 0), tl.sum(b_d, 0))
    return high_s, tl.max(largest, 0), sums[0], sums[1], sums[2], tl.min(column_s, 0), tl.min(column_t, 0), high_t


@triton.jit
def teacher_sum(S, O, start, stop, scale, BLOCK: tl.constexpr):
    """Returns the largest t and the sum of exp(t - largest)."""
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    for j in range(start, stop, BLOCK):
        _, t, _, _ = load_pair(S, O, None, None, j + lanes, j + lanes < stop, scale, 1)
        m, shrink, w, _ = online_softmax_step(m, t)
        a = a * shrink + w
    top = tl.max(m, 0)
    return top, tl.sum(a * exp(m - top), 0)


@triton.jit
def plain_first_sweep(S, O, start, stop, scale, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """`first_sweep` for a shared head without bias and softcap. Each column takes one exponential of s and one of d;
    only rows with extreme values need more."""
    lanes = tl.arange(0, BLOCK)
    s, _, d, _ = load_pair(S, O, None, None, start + lanes, start + lanes < stop, scale, 1)
    d0 = reference_difference(s, d)
    reference = tl.maximum(tl.max(s, 0), LOWEST)
    high_s, largest, a, b_e, b_d, column_s, column_t, high_t = plain_sums(
        S, O, start, stop, scale, reference, d0, STATS, BLOCK
    )
    if high_s - reference > HIGH:  # sums may have overflowed
        reference = high_s
        high_s, largest, a, b_e, b_d, column_s, column_t, high_t = plain_sums(
            S, O, start, stop, scale, reference, d0, STATS, BLOCK
        )
    # sum exp(t) = exp(reference + d0) sum w exp(d - d0), unless its terms are huge or cancel
    m_t, a_t = reference + d0, a + b_e
    if (largest >= FAR) | (b_e < -0.9 * a):
        m_t, a_t = teacher_sum(S, O, start, stop, scale, BLOCK)
    return reference, a, b_e, b_d, m_t, a_t, largest, d0, column_s, column_t, high_s, high_t


@triton.jit
def first_sweep(S, O, BIAS_S, BIAS_T, start, stop, V, scale, IS_DELTA: tl.constexpr, STATS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Returns the sums that `normalise` stores, for any logits, by an online softmax of both models."""
    lanes = tl.arange(0, BLOCK)
    s, t, d, _ = load_pair(S, O, BIAS_S, BIAS_T, start + lanes, start + lanes < stop, scale, IS_DELTA)
    d0 = reference_difference(s, d)
    m_s = tl.full([BLOCK], LOWEST, tl.float32)
    m_t, largest = m_s, m_s
    a_s = tl.zeros([BLOCK], tl.float32)
    a_t, b_e, b_d = a_s, a_s, a_s  # b_e = sum w expm1(d - d0), b_d = sum w (d - d0)
    top_s = tl.zeros([BLOCK], tl.int32)
    top_t = top_s
    for j in range(start, stop, BLOCK):
        cols = j + lanes
        s, t, d, _ = load_pair(S, O, BIAS_S, BIAS_T, cols, cols < stop, scale, IS_DELTA)
        d -= d0
        largest = tl.maximum(largest, d)
        m_s, shrink, w, up = online_softmax_step(m_s, s)
        a_s = a_s * shrink + w
        b_e = b_e * shrink + w * expm1_parts(d)[0]
        b_d = b_d * shrink + tl.where(w > 0, w * d, 0.0)
        if STATS:
            top_s = tl.where(up, cols, top_s)
        m_t, shrink, w, up = online_softmax_step(m_t, t)
        a_t = a_t * shrink + w
        if STATS:
            top_t = tl.where(up, cols, top_t)
    max_s, max_t = tl.max(m_s, 0), tl.max(m_t, 0)
    w = exp(m_s - max_s)
    first_s = tl.min(tl.where(m_s == max_s, top_s, V), 0)
    first_t = tl.min(tl.where(m_t == max_t, top_t, V), 0)
    return (
        max_s, tl.sum(a_s * w, 0), tl.sum(b_e * w, 0), tl.sum(b_d * w, 0), max_t, tl.sum(a_t * exp(m_t - max_t), 0),
        tl.max(largest, 0), d0, first_s, first_t, max_s, max_t,
    )  # fmt: skip


@triton.jit
def normalise(
    S, O, BIAS_S, BIAS_T, MASK, TARGETS, PARTS, stride_s, stride_o, V, inv_t_s, inv_t_t, softcap,
    IS_DELTA: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First sweep: stores the partial sums for both normalisers and c = lse_t - lse_s."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    if MASK is not None:
        stop = tl.where(tl.load(MASK + row) != 0, stop, start)
    S += row * stride_s
    O += row * stride_o
    scale = (inv_t_s, inv_t_t, softcap)
    if IS_DELTA and BIAS_S is None and softcap is None:
        m_s, a_s, b_e, b_d, m_t, a_t, largest, d0, column_s, column_t, top_s, top_t = plain_first_sweep(
            S, O, start, stop, scale, STATS, BLOCK
        )
    else:
        m_s, a_s, b_e, b_d, m_t, a_t, largest, d0, column_s, column_t, top_s, top_t = first_sweep(
            S, O, BIAS_S, BIAS_T, start, stop, V, scale, IS_DELTA, STATS, BLOCK
        )
    PARTS += (row * tl.num_programs(1) + tl.program_id(1)) * NUM_PARTS
    sums = (m_s, a_s, b_e, b_d, m_t, a_t, largest, d0)
    store_at(PARTS, (MAX_S, SUM_S, SUM_E, SUM_D, MAX_T, SUM_T, LARGEST_D, D0), sums, True)
    if STATS:
        if TARGETS is not None:
            target = tl.load(TARGETS + row)
            here = (target >= start) & (target < stop)
            s, t, _, _ = load_pair(S, O, BIAS_S, BIAS_T, target, here, scale, IS_DELTA)
            store_at(PARTS, (TARGET_S, TARGET_T), (tl.where(here, s, 0.0), tl.where(here, t, 0.0)), True)
        INTEGERS = PARTS.to(tl.pointer_type(tl.int32), bitcast=True)
        store_at(INTEGERS, (COLUMN_S, COLUMN_T), (column_s, column_t), True)
        store_at(PARTS, (TOP_S, TOP_T), (top_s, top_t), True)


@triton.jit
def merge_partials(P, AXIS: tl.constexpr):
    """Merges the first sweep's sums of a row's programs. Returns lse_s, lse_t, c = lse_t - lse_s, the mean of d under
    q and the largest d - c.

    P points at the programs' parts, along AXIS. Each program has its own d0; `shift` is their mean under q.
    """
    m_s, m_t = tl.load(P + MAX_S), tl.load(P + MAX_T)
    max_s, max_t = tl.max(m_s, AXIS), tl.max(m_t, AXIS)
    w = exp(m_s - tl.max(m_s, AXIS, keep_dims=True))
    a = tl.load(P + SUM_S) * w
    d0 = tl.load(P + D0)
    a_s = tl.sum(a, AXIS)
    a_t = tl.sum(tl.load(P + SUM_T) * exp(m_t - tl.max(m_t, AXIS, keep_dims=True)), AXIS)
    shift = tl.sum(a * d0, AXIS, keep_dims=True) / tl.sum(a, AXIS, keep_dims=True)
    delta = d0 - shift
    # sum w expm1(d - shift) = exp(d0 - shift) sum w expm1(d - d0) + expm1(d0 - shift) sum w
    excess = tl.sum(tl.load(P + SUM_E) * w * exp(delta) + expm1_parts(delta)[0] * a, AXIS) / a_s
    mean = tl.sum(tl.load(P + SUM_D) * w + a * d0, AXIS) / a_s
    lse_s, lse_t = max_s + tl.log(a_s), max_t + tl.log(a_t)
    is_near = (tl.max(tl.load(P + LARGEST_D), AXIS) < FAR) & (excess > -0.9)
    small = tl.abs(excess) < 0.5
    log_ratio = tl.where(
        small, log1p_parts(tl.where(small, excess, 0.0))[0], tl.log(1 + tl.where(is_near, excess, 0.0))
    )
    c = tl.where(is_near, tl.sum(a * d0, AXIS) / a_s + log_ratio, lse_t - lse_s)
    largest_x = tl.max(tl.load(P + LARGEST_D) + d0, AXIS) - c
    return lse_s, tl.where(is_near, lse_s + c, lse_t), c, mean, largest_x


@triton.jit
def evaluate(s, t, d, lse_s, lse_t, c, TERM: tl.constexpr, BETA: tl.constexpr, BOUNDED: tl.constexpr):
    """Returns p, q, p - q, l' and u'. BOUNDED: no x of the row exceeds FAR, so t is not read."""
    x = d - c
    q = exp(s - lse_s)
    e, bend = expm1_parts(x)
    near = tl.abs(x) < 0.5
    if BOUNDED:
        p = q * e + q
        gap = q * e
    else:
        p = tl.where(tl.abs(x) < 16, q * (e + 1), exp(t - lse_t))
        gap = tl.where(near, q * e, p - q)
    l, u = TERM(x, p, q, near, e, bend, BETA)
    return p, q, gap, l, u


@triton.jit
def clip_entries(l, u, gap, exists, entry_clip, slope):
    """Returns terms whose sum is that of the clipped textbook terms l' + k (p - q), u' (0 if clipped), and the mask of
    clipped entries. Unclipped terms stay l', small where p and q nearly agree, because sum (p - q) = 0."""
    tilt = slope * gap
    clipped = (l + tilt > entry_clip) & exists
    return tl.where(clipped, entry_clip - tilt, l), tl.where(clipped, 0.0, u), clipped


@triton.jit
def gradient(q, u, clipped, sum_u, lost, entry_clip, slope, softcap, slope_s):
    """Returns T dD / d(raw logit): 1_A u' - q sum_A u' + k q (1_notA - sum_notA q), times the derivative of softcap. A
    is the set of unclipped entries."""
    g = u - q * sum_u
    if entry_clip is not None:
        g += slope * q * (tl.where(clipped, 1.0, 0.0) - lost)
    if softcap is not None:
        g *= slope_s
    return g


@triton.jit
def finish_stats(PARTS, MASK, TARGETS, STATS_OUT, SPLITS: tl.constexpr):
    """Stores the statistics that follow from the first sweep: confidence, agreement, target log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    if counted:
        lanes = tl.arange(0, SPLITS)
        P = PARTS + (row * SPLITS + lanes) * NUM_PARTS
        lse_s, lse_t, _, _, _ = merge_partials(P, 0)
        m_s, m_t = tl.load(P + TOP_S), tl.load(P + TOP_T)
        best_s = tl.min(tl.where(m_s == tl.max(m_s, 0), lanes, SPLITS - 1), 0)
        best_t = tl.min(tl.where(m_t == tl.max(m_t, 0), lanes, SPLITS - 1), 0)
        tops = (PARTS + row * SPLITS * NUM_PARTS).to(tl.pointer_type(tl.int32), bitcast=True)
        top_s = tl.load(tops + best_s * NUM_PARTS + COLUMN_S)
        top_t = tl.load(tops + best_t * NUM_PARTS + COLUMN_T)
        STATS_OUT += row * NUM_ROW_STATS
        agree = (top_s == top_t).to(tl.float32)
        store_at(STATS_OUT, (CONFIDENCE, AGREE), (exp(tl.max(m_s, 0) - lse_s), agree), True)
        if TARGETS is not None:
            logprob_s, logprob_t = tl.sum(tl.load(P + TARGET_S), 0) - lse_s, tl.sum(tl.load(P + TARGET_T), 0) - lse_t
            store_at(STATS_OUT, (LOGPROB_S, LOGPROB_T), (logprob_s, logprob_t), True)


@triton.jit
def second_sweep(
    S, O, G, BIAS_S, BIAS_T, start, stop, scale, normalisers, sum_u, lost, factor, entry_clip, slope,
    TERM: tl.constexpr, BETA: tl.constexpr, PHASE: tl.constexpr, IS_DELTA: tl.constexpr, STATS: tl.constexpr,
    BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`accumulate`'s loop. Returns the sums l' clipped sum_u lost_q entropy_s entropy_t; stores the gradient in G."""
    lse_s, lse_t, c = normalisers
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t = zeros, zeros, zeros, zeros, zeros, zeros
    for j in range(start, stop, BLOCK):
        cols = j + lanes
        exists = cols < stop
        s, t, d, slope_s = load_pair(S, O, BIAS_S, BIAS_T, cols, exists, scale, IS_DELTA)
        p, q, gap, l, u = evaluate(s, t, d, lse_s, lse_t, c, TERM, BETA, BOUNDED)
        bounded, clipped = l, exists
        if entry_clip is not None:
            bounded, u, clipped = clip_entries(l, u, gap, exists, entry_clip, slope)
        if PHASE != "grad":
            loss += l
            if entry_clip is not None:
                clipped_loss += bounded
                lost_q += tl.where(clipped, q, 0.0)
            if PHASE == "sum":
                total_u += u
            if STATS:
                entropy_s += tl.where(q > 0, q * (lse_s - s), 0.0)
                entropy_t += tl.where(p > 0, p * (lse_t - t), 0.0)
        if PHASE != "sum":
            g = gradient(q, u, clipped, sum_u, lost, entry_clip, slope, scale[2], slope_s)
            tl.store(G + cols, (g * factor).to(G.dtype.element_ty), mask=exists)
    total = tl.sum(loss, 0)
    if entry_clip is not None:
        clipped_total = tl.sum(clipped_loss, 0)
    else:
        clipped_total = total
    return total, clipped_total, tl.sum(total_u, 0), tl.sum(lost_q, 0), tl.sum(entropy_s, 0), tl.sum(entropy_t, 0)


@triton.jit
def accumulate(
    S, O, G, BIAS_S, BIAS_T, MASK, WEIGHT, PARTS, SUMS, stride_s, stride_o, stride_g, V,
    inv_t_s, inv_t_t, softcap, entry_clip, token_clip, slope, grad_scale,
    TERM: tl.constexpr, BOUNDED_TERM: tl.constexpr, BETA: tl.constexpr, DERIVATIVE_SUM: tl.constexpr,
    PHASE: tl.constexpr, IS_DELTA: tl.constexpr, STATS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sweeps after the first. PHASE "sum" stores the row's sums, "grad" its gradient (in place if G is O), and
    "both" does both at once. "both" needs sum u' in advance (`DivergenceTerm.derivative_sum`)."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    S += row * stride_s
    O += row * stride_o
    G += row * stride_g
    scale = (inv_t_s, inv_t_t, softcap)
    if counted:
        P = PARTS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_PARTS
        lse_s, lse_t, c, mean_d, largest_x = merge_partials(P, 0)
        sum_u, lost, factor = 0.0, 0.0, 1.0
        if PHASE != "sum":
            factor = inv_t_s * grad_scale
            if WEIGHT is not None:
                factor *= tl.load(WEIGHT + row).to(tl.float32)
        if PHASE == "both" and DERIVATIVE_SUM == "reverse_kl":
            sum_u = c - mean_d
        if PHASE == "grad":
            R = SUMS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_SUMS
            sum_u = tl.sum(tl.load(R + TOTAL_U), 0)
            if entry_clip is not None:
                lost = tl.sum(tl.load(R + LOST_Q), 0)
            if token_clip is not None:
                factor = tl.where(tl.sum(tl.load(R + CLIPPED_LOSS), 0) <= token_clip, factor, 0.0)
        plain = False
        if IS_DELTA and BIAS_S is None and softcap is None:
            plain = largest_x < FAR
        if plain:
            loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t = second_sweep(
                S, O, G, None, None, start, stop, scale, (lse_s, lse_t, c), sum_u, lost, factor, entry_clip, slope,
                BOUNDED_TERM, BETA, PHASE, IS_DELTA, STATS, True, BLOCK,
            )  # fmt: skip
        else:
            loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t = second_sweep(
                S, O, G, BIAS_S, BIAS_T, start, stop, scale, (lse_s, lse_t, c), sum_u, lost, factor, entry_clip, slope,
                TERM, BETA, PHASE, IS_DELTA, STATS, False, BLOCK,
            )  # fmt: skip
        if PHASE != "grad":
            R = SUMS + (row * SPLITS + tl.program_id(1)) * NUM_SUMS
            sums = (loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t)
            store_at(R, (LOSS, CLIPPED_LOSS, TOTAL_U, LOST_Q, ENTROPY_S, ENTROPY_T), sums, True)
    elif PHASE != "sum":
        lanes = tl.arange(0, BLOCK)
        for j in range(start, stop, BLOCK):
            tl.store(G + j + lanes, tl.zeros([BLOCK], G.dtype.element_ty), mask=j + lanes < stop)
