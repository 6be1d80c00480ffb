"""Row kernels over logits in memory: normalisers, sums of a divergence, gradient.

A program owns the part of a row that `num_programs(1)` leaves it: one program per row, or several where rows are few.
Programs write their partial sums side by side and the next kernel adds them up in a fixed order, so results do not
depend on scheduling. Accumulators are vectors, one slot per lane, reduced once at the end.
"""

import triton
import triton.language as tl

from .terms import expm1_parts, log1p_parts, tanh

LOWEST = tl.constexpr(-3.0e38)  # in place of -inf, whose difference with itself is NaN
FAR = tl.constexpr(40.0)  # log p - log q beyond which the sum under q may miss the teacher's mass
NUM_PARTS = tl.constexpr(16)  # normalise: m_s a_s b d m_t a_t largest_d d0 s_target t_target top_s top_t
NUM_SUMS = tl.constexpr(8)  # accumulate: l' clipped sum_u lost_q entropy_s entropy_t
NUM_ROW_STATS = tl.constexpr(4)  # confidence logprob_s logprob_t agree


@triton.jit
def span(V, BLOCK: tl.constexpr):
    """The columns of this program: [start, stop)."""
    blocks = tl.cdiv(tl.cdiv(V, BLOCK), tl.num_programs(1))
    start = tl.program_id(1) * blocks * BLOCK
    return start, tl.minimum(start + blocks * BLOCK, V)


@triton.jit
def prepare(
    s, o, bias_s, bias_t, exists, inv_t_s, inv_t_t, softcap,
    IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Scaled logits s, t and d = t - s, fp32, from raw student logits and either raw differences or teacher logits.

    d is formed from the raw difference, never from two rounded logits. Where `exists` is false, and where both models
    exclude an entry, s = t = -inf and d = 0.
    """
    if IS_DELTA:
        d = o.to(tl.float32)
        t = s.to(tl.float32) + d
    else:
        d = (o - s).to(tl.float32)
        t = o.to(tl.float32)
    s = s.to(tl.float32)
    if HAS_BIAS:
        s += bias_s
        t += bias_t
        d += tl.where(bias_t == bias_s, 0.0, bias_t - bias_s)
    if HAS_SOFTCAP:
        # tanh(a + b) - tanh(a) = tanh(b) (1 - tanh(a)^2) / (1 + tanh(a) tanh(b))
        tanh_s, tanh_d = tanh(s / softcap), tanh(d / softcap)
        s, t = softcap * tanh_s, softcap * tanh(t / softcap)
        d = tl.where(tl.abs(d) < FAR, softcap * tanh_d * (1 - tanh_s * tanh_s) / (1 + tanh_s * tanh_d), t - s)
    if HAS_TEMPERATURE:
        d = d * inv_t_t + s * (inv_t_t - inv_t_s)
        s, t = s * inv_t_s, t * inv_t_t
    s, t = tl.where(exists, s, -float("inf")), tl.where(exists, t, -float("inf"))
    one_sided = (s == -float("inf")) | (t == -float("inf"))
    return s, t, tl.where(one_sided, tl.where(s == t, 0.0, t - s), d)


@triton.jit
def load_pair(
    S, O, BIAS_S, BIAS_T, cols, exists, inv_t_s, inv_t_t, softcap,
    IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """`prepare` from memory: S, O at the row's start."""
    s = tl.load(S + cols, mask=exists, other=0.0)
    o = tl.load(O + cols, mask=exists, other=0.0)
    bias_s, bias_t = 0.0, 0.0
    if HAS_BIAS:
        bias_s = tl.load(BIAS_S + cols, mask=exists, other=0.0).to(tl.float32)
        bias_t = tl.load(BIAS_T + cols, mask=exists, other=0.0).to(tl.float32)
    return prepare(
        s, o, bias_s, bias_t, exists, inv_t_s, inv_t_t, softcap, IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
    )  # fmt: skip


@triton.jit
def grow(m, z):
    """Online softmax: the new maximum, the factor on old sums, the weight of z. One exponential, no branch."""
    up = z > m
    shrink = tl.exp(-tl.abs(z - m))
    return tl.where(up, z, m), tl.where(up, shrink, 1.0), tl.where(up, 1.0, shrink), up


@triton.jit
def reference_difference(s, d):
    """A d0 near the mean of d under q, from one block: sums of d - d0 then lose no digits."""
    top = tl.maximum(tl.max(s, 0), LOWEST)
    w = tl.where(tl.abs(d) < FAR, tl.exp(s - top), 0.0)
    total = tl.sum(w, 0)
    d0 = tl.sum(tl.where(w > 0, w * d, 0.0), 0) / tl.where(total > 0, total, 1.0)
    return tl.where(tl.abs(d0) < FAR, d0, 0.0)


@triton.jit
def normalise(
    S, O, BIAS_S, BIAS_T, MASK, TARGETS, PARTS, stride_s, stride_o, V, inv_t_s, inv_t_t, softcap,
    IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TARGETS: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First sweep: what both normalisers, and c = lse_t - lse_s, are made of."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    if HAS_MASK:
        stop = tl.where(tl.load(MASK + row) != 0, stop, start)
    S += row * stride_s
    O += row * stride_o
    lanes = tl.arange(0, BLOCK)
    s, t, d = load_pair(
        S, O, BIAS_S, BIAS_T, start + lanes, start + lanes < stop, inv_t_s, inv_t_t, softcap,
        IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    d0 = reference_difference(s, d)
    m_s = tl.full([BLOCK], LOWEST, tl.float32)
    m_t = m_s
    largest = m_s
    a_s = tl.zeros([BLOCK], tl.float32)
    a_t = a_s
    b_e = a_s  # sum w expm1(d - d0)
    b_d = a_s  # sum w (d - d0)
    top_s = tl.zeros([BLOCK], tl.int32)
    top_t = top_s
    for j in range(start, stop, BLOCK):
        cols = j + lanes
        s, t, d = load_pair(
            S, O, BIAS_S, BIAS_T, cols, cols < stop, inv_t_s, inv_t_t, softcap,
            IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        d -= d0
        largest = tl.maximum(largest, d)
        m_s, shrink, w, up = grow(m_s, s)
        a_s = a_s * shrink + w
        b_e = b_e * shrink + w * expm1_parts(d)[0]
        b_d = b_d * shrink + tl.where(w > 0, w * d, 0.0)
        if STATS:
            top_s = tl.where(up, cols, top_s)
        m_t, shrink, w, up = grow(m_t, t)
        a_t = a_t * shrink + w
        if STATS:
            top_t = tl.where(up, cols, top_t)
    max_s, max_t = tl.max(m_s, 0), tl.max(m_t, 0)
    w = tl.exp(m_s - max_s)
    PARTS += (row * tl.num_programs(1) + tl.program_id(1)) * NUM_PARTS
    tl.store(PARTS, max_s)
    tl.store(PARTS + 1, tl.sum(a_s * w, 0))
    tl.store(PARTS + 2, tl.sum(b_e * w, 0))
    tl.store(PARTS + 3, tl.sum(b_d * w, 0))
    tl.store(PARTS + 4, max_t)
    tl.store(PARTS + 5, tl.sum(a_t * tl.exp(m_t - max_t), 0))
    tl.store(PARTS + 6, tl.max(largest, 0))
    tl.store(PARTS + 7, d0)
    if STATS:
        if HAS_TARGETS:
            target = tl.load(TARGETS + row)
            here = (target >= start) & (target < stop)
            s, t, d = load_pair(
                S, O, BIAS_S, BIAS_T, target, here, inv_t_s, inv_t_t, softcap,
                IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
            )  # fmt: skip
            tl.store(PARTS + 8, tl.where(here, s, 0.0))
            tl.store(PARTS + 9, tl.where(here, t, 0.0))
        first_s = tl.min(tl.where(m_s == max_s, top_s, V), 0)
        first_t = tl.min(tl.where(m_t == max_t, top_t, V), 0)
        tl.store((PARTS + 10).to(tl.pointer_type(tl.int32), bitcast=True), first_s)
        tl.store((PARTS + 11).to(tl.pointer_type(tl.int32), bitcast=True), first_t)


@triton.jit
def merged(P, AXIS: tl.constexpr):
    """lse_s, lse_t, c = lse_t - lse_s and the mean of d under q, from the first sweep's partial sums.

    P points at the parts of a row's programs, which lie along AXIS. Each has its own d0; D0 is their mean under q.
    """
    m_s, m_t = tl.load(P), tl.load(P + 4)
    max_s, max_t = tl.max(m_s, AXIS), tl.max(m_t, AXIS)
    w = tl.exp(m_s - tl.max(m_s, AXIS, keep_dims=True))
    a = tl.load(P + 1) * w
    d0 = tl.load(P + 7)
    a_s = tl.sum(a, AXIS)
    a_t = tl.sum(tl.load(P + 5) * tl.exp(m_t - tl.max(m_t, AXIS, keep_dims=True)), AXIS)
    shift = tl.sum(a * d0, AXIS, keep_dims=True) / tl.sum(a, AXIS, keep_dims=True)
    delta = d0 - shift
    # sum w expm1(d - D0) = sum w expm1(d - d0) + expm1(d0 - D0) sum w exp(d - d0)
    b = tl.load(P + 2) * w
    excess = tl.sum(b + expm1_parts(delta)[0] * (a + b), AXIS) / a_s
    mean = tl.sum(tl.load(P + 3) * w + a * d0, AXIS) / a_s
    lse_s, lse_t = max_s + tl.log(a_s), max_t + tl.log(a_t)
    is_near = (tl.max(tl.load(P + 6), AXIS) < FAR) & (excess > -0.9)
    small = tl.abs(excess) < 0.5
    log_ratio = tl.where(
        small, log1p_parts(tl.where(small, excess, 0.0))[0], tl.log(1 + tl.where(is_near, excess, 0.0))
    )
    c = tl.where(is_near, tl.sum(a * d0, AXIS) / a_s + log_ratio, lse_t - lse_s)
    return lse_s, tl.where(is_near, lse_s + c, lse_t), c, mean


@triton.jit
def evaluate(
    s, t, d, lse_s, lse_t, c, exists, entry_clip, slope,
    TERM: tl.constexpr, BETA: tl.constexpr, HAS_ENTRY_CLIP: tl.constexpr,
):  # fmt: skip
    """p, q, l', and under an entry clip: u' without the clipped entries, the clipped textbook term, what is clipped,
    and k q. The textbook term is l' + k (p - q)."""
    x = d - c
    q = tl.exp(s - lse_s)
    e, bend = expm1_parts(x)
    p = tl.where(tl.abs(x) < 16, q * (e + 1), tl.exp(t - lse_t))
    near = tl.abs(x) < 0.5
    l, u = TERM(x, p, q, near, e, bend, BETA)
    plain, clipped, k_q = l, exists, q
    if HAS_ENTRY_CLIP:
        plain = l + slope * tl.where(near, q * e, p - q)
        clipped = (plain > entry_clip) & exists
        plain = tl.where(clipped, entry_clip, tl.where(exists, plain, 0.0))
        u = tl.where(clipped, 0.0, u)
        k_q = slope * q
    return p, q, l, u, plain, clipped, k_q


@triton.jit
def gradient(
    s, q, u, k_q, clipped, sum_u, lost, inv_t_s, softcap, exists,
    HAS_ENTRY_CLIP: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dD / d(raw logit), but for the factor 1 / T: 1_A u' - q sum_A u' + k q (1_notA - sum_notA q)."""
    g = u - q * sum_u
    if HAS_ENTRY_CLIP:
        g += k_q * (tl.where(clipped, 1.0, 0.0) - lost)
    if HAS_SOFTCAP:
        tanh_s = s / (inv_t_s * softcap)
        g *= tl.where(exists, 1 - tanh_s * tanh_s, 0.0)
    return g


@triton.jit
def settle(PARTS, MASK, STATS_OUT, HAS_MASK: tl.constexpr, HAS_TARGETS: tl.constexpr, SPLITS: tl.constexpr):
    """The statistics that the first sweep settles: confidence, log-probabilities of the target, agreement."""
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if HAS_MASK:
        counted = tl.load(MASK + row) != 0
    if counted:
        lanes = tl.arange(0, SPLITS)
        P = PARTS + (row * SPLITS + lanes) * NUM_PARTS
        lse_s, lse_t, _, _ = merged(P, 0)
        m_s, m_t = tl.load(P), tl.load(P + 4)
        best_s = tl.min(tl.where(m_s == tl.max(m_s, 0), lanes, SPLITS - 1), 0)
        best_t = tl.min(tl.where(m_t == tl.max(m_t, 0), lanes, SPLITS - 1), 0)
        tops = (PARTS + row * SPLITS * NUM_PARTS).to(tl.pointer_type(tl.int32), bitcast=True)
        top_s, top_t = tl.load(tops + best_s * NUM_PARTS + 10), tl.load(tops + best_t * NUM_PARTS + 11)
        STATS_OUT += row * NUM_ROW_STATS
        tl.store(STATS_OUT, tl.exp(tl.max(m_s, 0) - lse_s))
        tl.store(STATS_OUT + 3, (top_s == top_t).to(tl.float32))
        if HAS_TARGETS:
            tl.store(STATS_OUT + 1, tl.sum(tl.load(P + 8), 0) - lse_s)
            tl.store(STATS_OUT + 2, tl.sum(tl.load(P + 9), 0) - lse_t)


@triton.jit
def accumulate(
    S, O, G, BIAS_S, BIAS_T, MASK, WEIGHT, PARTS, SUMS, stride_s, stride_o, stride_g, V,
    inv_t_s, inv_t_t, softcap, entry_clip, token_clip, slope, grad_scale,
    TERM: tl.constexpr, BETA: tl.constexpr, SUM_U: tl.constexpr, PHASE: tl.constexpr,
    IS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_ENTRY_CLIP: tl.constexpr, HAS_TOKEN_CLIP: tl.constexpr,
    STATS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sweeps after the first. PHASE "sum" adds up the row, "grad" writes its gradient (over O, if G is O), "both"
    does so at once, where sum u' is known in advance: SUM_U "zero" (sum q - p), or "mean" (-sum q x)."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    lanes = tl.arange(0, BLOCK)
    counted = True
    if HAS_MASK:
        counted = tl.load(MASK + row) != 0
    S += row * stride_s
    O += row * stride_o
    G += row * stride_g
    part = (row * SPLITS + tl.program_id(1)) * NUM_SUMS
    if counted:
        lse_s, lse_t, c, mean_d = merged(PARTS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_PARTS, 0)
        zeros = tl.zeros([BLOCK], tl.float32)
        loss, clipped_loss, total_u, lost_q, entropy_s, entropy_t = zeros, zeros, zeros, zeros, zeros, zeros
        sum_u, lost, factor = 0.0, 0.0, 1.0
        if PHASE != "sum":
            factor = inv_t_s * grad_scale
            if HAS_WEIGHT:
                factor *= tl.load(WEIGHT + row).to(tl.float32)
        if PHASE == "both" and SUM_U == "mean":
            sum_u = c - mean_d
        if PHASE == "grad":
            R = SUMS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_SUMS
            sum_u = tl.sum(tl.load(R + 2), 0)
            if HAS_ENTRY_CLIP:
                lost = tl.sum(tl.load(R + 3), 0)
            if HAS_TOKEN_CLIP:
                value = tl.sum(tl.load(R + 1), 0)
                factor = tl.where(value <= token_clip, factor, 0.0)
        for j in range(start, stop, BLOCK):
            cols = j + lanes
            exists = cols < stop
            s, t, d = load_pair(
                S, O, BIAS_S, BIAS_T, cols, exists, inv_t_s, inv_t_t, softcap,
                IS_DELTA, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
            )  # fmt: skip
            p, q, l, u, plain, clipped, k_q = evaluate(
                s, t, d, lse_s, lse_t, c, exists, entry_clip, slope, TERM, BETA, HAS_ENTRY_CLIP
            )
            if PHASE != "grad":
                loss += l
            if HAS_ENTRY_CLIP:
                clipped_loss += plain
                lost_q += tl.where(clipped, q, 0.0)
            if PHASE == "sum":
                total_u += u
            if STATS and PHASE != "grad":
                entropy_s += tl.where(q > 0, q * (lse_s - s), 0.0)
                entropy_t += tl.where(p > 0, p * (lse_t - t), 0.0)
            if PHASE != "sum":
                g = gradient(s, q, u, k_q, clipped, sum_u, lost, inv_t_s, softcap, exists, HAS_ENTRY_CLIP, HAS_SOFTCAP)
                g *= factor
                tl.store(G + cols, g.to(G.dtype.element_ty), mask=exists)
        if PHASE != "grad":
            total = tl.sum(loss, 0)
            tl.store(SUMS + part, total)
            tl.store(SUMS + part + 1, tl.sum(clipped_loss, 0) if HAS_ENTRY_CLIP else total)
            tl.store(SUMS + part + 2, tl.sum(total_u, 0))
            tl.store(SUMS + part + 3, tl.sum(lost_q, 0))
            if STATS:
                tl.store(SUMS + part + 4, tl.sum(entropy_s, 0))
                tl.store(SUMS + part + 5, tl.sum(entropy_t, 0))
    elif PHASE != "sum":
        for j in range(start, stop, BLOCK):
            tl.store(G + j + lanes, tl.zeros([BLOCK], G.dtype.element_ty), mask=j + lanes < stop)
