"""Row kernels of one model's logits: log-probability of a target, entropy, confidence, gradient."""

import triton
import triton.language as tl

from .rows import LOWEST, grow, load_bias, put, span
from .terms import exp, tanh

NUM_LOGPROB_PARTS = tl.constexpr(8)  # m, a, sum w (s - s0), s0, target's logit
NUM_LOGPROB_OUT = tl.constexpr(4)  # log-probability, entropy, confidence, lse


@triton.jit
def scaled(s, bias, exists, inv_t, softcap):
    """softcap * tanh((s + bias) / softcap) / temperature in fp32; -inf where `exists` is false."""
    s = s.to(tl.float32)
    if bias is not None:
        s += bias
    if softcap is not None:
        s = softcap * tanh(s / softcap)
    return tl.where(exists, s * inv_t, -float("inf"))


@triton.jit
def load_logits(S, BIAS, cols, exists, inv_t, softcap):
    s = tl.load(S + cols, mask=exists, other=0.0)
    return scaled(s, load_bias(BIAS, cols, exists), exists, inv_t, softcap)


@triton.jit
def logprob_gradient(s, lse, hit, exists, inv_t, softcap):
    """d log q[target] / d(raw logit), but for the factor 1 / T: 1[j = target] - q_j."""
    g = tl.where(hit, 1.0, 0.0) - exp(s - lse)
    if softcap is not None:
        tanh_s = s / (inv_t * softcap)
        g *= tl.where(exists, 1 - tanh_s * tanh_s, 0.0)
    return g


@triton.jit
def normalise_one(
    S, BIAS, MASK, TARGETS, PARTS, stride_s, V, inv_t, softcap, STATS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First sweep: the normaliser, and the mean logit for the entropy."""
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
        s0 = tl.maximum(tl.max(first, 0), LOWEST)
    for j in range(start, stop, BLOCK):
        s = load_logits(S, BIAS, j + lanes, j + lanes < stop, inv_t, softcap)
        m, shrink, w, _ = grow(m, s)
        a = a * shrink + w
        if STATS:
            b = b * shrink + tl.where(w > 0, w * (s - s0), 0.0)
    top = tl.max(m, 0)
    w = exp(m - top)
    # the target's logit here, because the next kernel may overwrite it before another program of the row reads it
    target = tl.load(TARGETS + row)
    here = (target >= start) & (target < stop)
    at_target = tl.where(here, load_logits(S, BIAS, target, here, inv_t, softcap), 0.0)
    PARTS += (row * tl.num_programs(1) + tl.program_id(1)) * NUM_LOGPROB_PARTS
    put(PARTS, (top, tl.sum(a * w, 0), tl.sum(b * w, 0), s0, at_target), True)


@triton.jit
def finish_logprob(
    S, G, BIAS, MASK, TARGETS, WEIGHT, PARTS, OUT, stride_s, stride_g, V, inv_t, softcap, grad_scale,
    GRAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log q[target], statistics, and d log q[target] / dz_j into G."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = span(V, BLOCK)
    lanes = tl.arange(0, BLOCK)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    G += row * stride_g
    if counted:
        P = PARTS + (row * SPLITS + tl.arange(0, SPLITS)) * NUM_LOGPROB_PARTS
        m = tl.load(P)
        top = tl.max(m, 0)
        w = exp(m - top)
        a = tl.sum(tl.load(P + 1) * w, 0)
        lse = top + tl.log(a)
        target = tl.load(TARGETS + row)
        S += row * stride_s
        if tl.program_id(1) == 0:
            s0 = tl.load(PARTS + row * SPLITS * NUM_LOGPROB_PARTS + 3)
            mean = tl.sum((tl.load(P + 2) + tl.load(P + 1) * (tl.load(P + 3) - s0)) * w, 0) / a
            logprob = tl.sum(tl.load(P + 4), 0) - lse
            put(OUT + row * NUM_LOGPROB_OUT, (logprob, (lse - s0) - mean, exp(top - lse), lse), True)
        if GRAD:
            factor = inv_t * grad_scale
            if WEIGHT is not None:
                factor *= tl.load(WEIGHT + row).to(tl.float32)
            for j in range(start, stop, BLOCK):
                cols = j + lanes
                exists = cols < stop
                s = load_logits(S, BIAS, cols, exists, inv_t, softcap)
                g = logprob_gradient(s, lse, cols == target, exists, inv_t, softcap) * factor
                tl.store(G + cols, g.to(G.dtype.element_ty), mask=exists)
    elif GRAD:
        for j in range(start, stop, BLOCK):
            tl.store(G + j + lanes, tl.zeros([BLOCK], G.dtype.element_ty), mask=j + lanes < stop)


@triton.jit
def span_mean(OUT, LENGTHS, EXPOSED, MEAN, T, BLOCK: tl.constexpr):
    """Mean log-probability of a sequence's tokens [exposed, length); 0 if there is none."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(EXPOSED + sequence), 0)
    stop = tl.minimum(tl.load(LENGTHS + sequence), T)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(start, stop, BLOCK):
        place = j + tl.arange(0, BLOCK)
        total += tl.load(OUT + (sequence * T + place) * NUM_LOGPROB_OUT, mask=place < stop, other=0.0)
    count = tl.maximum(stop - start, 1)
    tl.store(MEAN + sequence, tl.sum(total, 0) / count.to(tl.float32))
