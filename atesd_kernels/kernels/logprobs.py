"""Row kernels of one model's logits: log-probability of a target, entropy, confidence, gradient."""

import triton
import triton.language as tl

from .rows import LOWEST, load_bias, online_softmax_step, span, store_at
from .terms import capped, capped_slope, exp

# Positions of a program's partial results in PARTS, which `normalise_one` stores. w = exp(s - PART_MAX).
PART_MAX = tl.constexpr(0)
PART_SUM = tl.constexpr(1)  # sum w
PART_MEAN = tl.constexpr(2)  # sum w (s - PART_SHIFT)
PART_SHIFT = tl.constexpr(3)
PART_TARGET = tl.constexpr(4)  # the target's logit, 0 if another program has it
NUM_LOGPROB_PARTS = tl.constexpr(8)
# Positions in OUT, which `finish_logprob` stores.
OUT_LOGPROB = tl.constexpr(0)
OUT_ENTROPY = tl.constexpr(1)
OUT_CONFIDENCE = tl.constexpr(2)
OUT_LSE = tl.constexpr(3)
NUM_LOGPROB_OUT = tl.constexpr(4)


@triton.jit
def raw(s, bias):
    """Returns s + bias in fp32."""
    s = s.to(tl.float32)
    if bias is not None:
        s += bias
    return s


@triton.jit
def scaled(z, exists, inv_t, softcap):
    """Returns softcap * tanh(z / softcap) / temperature; -inf where z is or `exists` is false."""
    if softcap is not None:
        z = capped(z, softcap)
    return tl.where(exists, z * inv_t, -float("inf"))


@triton.jit
def load_raw(S, BIAS, cols, exists):
    return raw(tl.load(S + cols, mask=exists, other=0.0), load_bias(BIAS, cols, exists))


@triton.jit
def load_logits(S, BIAS, cols, exists, inv_t, softcap):
    return scaled(load_raw(S, BIAS, cols, exists), exists, inv_t, softcap)


@triton.jit
def logprob_gradient(z, lse, hit, exists, inv_t, softcap):
    """Returns T d log q[target] / dz = 1[j = target] - q_j, times the derivative of softcap, from raw logits z."""
    g = tl.where(hit, 1.0, 0.0) - exp(scaled(z, exists, inv_t, softcap) - lse)
    if softcap is not None:
        g *= capped_slope(z, softcap)
    return g


@triton.jit
def store_parts(P, top, total, mean, shift, at_target, mask):
    """Stores a program's partial results, for one row or a tile of rows."""
    positions = (PART_MAX, PART_SUM, PART_MEAN, PART_SHIFT, PART_TARGET)
    store_at(P, positions, (top, total, mean, shift, at_target), mask)


@triton.jit
def normalise_one(
    S, BIAS, MASK, TARGETS, PARTS, stride_s, V, inv_t, softcap, STATS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First sweep: stores the partial sums for the normaliser and for the entropy's mean logit."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    if MASK is not None:
        stop = tl.where(tl.load(MASK + row) != 0, stop, start)
    S += row * stride_s
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    b = a
    s0 = 0.0
    if STATS:
        first = load_logits(S, BIAS, start + lanes, start + lanes < stop, inv_t, softcap)
        s0 = tl.max(first, 0)
        s0 = tl.where(s0 == -float("inf"), 0.0, s0)  # the block's entries are all excluded
    for j in range(start, stop, BLOCK):
        s = load_logits(S, BIAS, j + lanes, j + lanes < stop, inv_t, softcap)
        m, shrink, w, _ = online_softmax_step(m, s)
        a = a * shrink + w
        if STATS:
            b = b * shrink + tl.where(w > 0, w * (s - s0), 0.0)
    top = tl.max(m, 0)
    w = exp(m - top)
    # read the target's logit now: a program of the next kernel may overwrite it before another one reads it
    target = tl.load(TARGETS + row)
    here = (target >= start) & (target < stop)
    at_target = tl.where(here, load_logits(S, BIAS, target, here, inv_t, softcap), 0.0)
    PARTS += (row * tl.num_programs(1) + tl.program_id(1)) * NUM_LOGPROB_PARTS
    store_parts(PARTS, top, tl.sum(a * w, 0), tl.sum(b * w, 0), s0, at_target, True)


@triton.jit
def finish_logprob(
    S, G, BIAS, MASK, TARGETS, WEIGHT, PARTS, OUT, stride_s, stride_g, V, inv_t, softcap, grad_scale,
    GRAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores log q[target] and statistics in OUT, and d log q[target] / dz_j in G."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    lanes = tl.arange(0, BLOCK)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    G += row * stride_g
    if counted:
        P = PARTS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_LOGPROB_PARTS
        m = tl.load(P + PART_MAX)
        top = tl.max(m, 0)
        w = exp(m - top)
        a = tl.sum(tl.load(P + PART_SUM) * w, 0)
        lse = tl.where(a == 0, LOWEST, top + tl.log(a))  # finite where every entry is excluded
        target = tl.load(TARGETS + row)
        S += row * stride_s
        if tl.program_id(1) == 0:
            s0 = tl.load(PARTS + row * SPLITS * NUM_LOGPROB_PARTS + PART_SHIFT)
            shift = tl.load(P + PART_SHIFT) - s0
            mean = tl.sum((tl.load(P + PART_MEAN) + tl.load(P + PART_SUM) * shift) * w, 0) / a
            logprob = tl.sum(tl.load(P + PART_TARGET), 0) - lse
            results = (logprob, (lse - s0) - mean, exp(top - lse), lse)
            OUT += row * NUM_LOGPROB_OUT
            store_at(OUT, (OUT_LOGPROB, OUT_ENTROPY, OUT_CONFIDENCE, OUT_LSE), results, True)
        if GRAD:
            factor = inv_t * grad_scale
            if WEIGHT is not None:
                factor *= tl.load(WEIGHT + row).to(tl.float32)
            for j in range(start, stop, BLOCK):
                cols = j + lanes
                exists = cols < stop
                z = load_raw(S, BIAS, cols, exists)
                g = logprob_gradient(z, lse, cols == target, exists, inv_t, softcap) * factor
                tl.store(G + cols, g.to(G.dtype.element_ty), mask=exists)
    elif GRAD:
        for j in range(start, stop, BLOCK):
            tl.store(G + j + lanes, tl.zeros([BLOCK], G.dtype.element_ty), mask=j + lanes < stop)


@triton.jit
def span_mean(OUT, LENGTHS, EXPOSED, MEAN, T, BLOCK: tl.constexpr):
    """Stores the mean log-probability of a sequence's tokens [exposed, length); 0 for an empty span."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(EXPOSED + sequence), 0)
    stop = tl.minimum(tl.load(LENGTHS + sequence), T)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(start, stop, BLOCK):
        place = j + tl.arange(0, BLOCK)
        total += tl.load(OUT + (sequence * T + place) * NUM_LOGPROB_OUT + OUT_LOGPROB, mask=place < stop, other=0.0)
    count = tl.maximum(stop - start, 1)
    tl.store(MEAN + sequence, tl.sum(total, 0) / count.to(tl.float32))
