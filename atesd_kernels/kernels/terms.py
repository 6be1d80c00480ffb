"""The divergences in Triton: one function each, which returns the centred pair (l', u') of `divergences.py`.

A function receives, elementwise in fp32,

    x = log p - log q (+-inf where one side is impossible), p, q,
    near = |x| < 1/2, and there e = expm1(x) and bend = expm1(x) - x, both to rounding,

and the constant `BETA`. Where `near`, l' is a sum of second-order quantities, so nothing cancels; elsewhere it is the
textbook formula. A function must not return NaN where p, q or both are 0.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """Returns e^x, flushed to 0 below 1e-38. Two instructions; `tl.exp` takes three more to keep such results."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """Returns 1 / x for x > 0, accurate to rounding, with half the instructions of a division."""
    r = tl.rsqrt(x)
    r = r * r
    return r * (2 - x * r)


@triton.jit
def expm1_parts(x):
    """Returns expm1(x) and expm1(x) - x, accurate to rounding also for tiny x."""
    small = tl.abs(x) < 0.5
    # (expm1(x) - x) / x^2 on |x| < 1/2: the degree-5 polynomial with the smallest relative error, 2.4e-8
    g = 0.008333452045917511 + x * (0.0013981997035443783 + x * 0.0001987562864087522)
    bend = x * x * (0.5 + x * (0.1666666567325592 + x * (0.04166579619050026 + x * g)))
    e = exp(x) - 1
    return tl.where(small, x + bend, e), tl.where(small, bend, e - x)


@triton.jit
def log1p_parts(y):
    """Returns log1p(y) and log1p(y) - y for |y| < 2/3, from 2 atanh(z) with z = y / (2 + y)."""
    z = y * reciprocal(2 + y)
    z2 = z * z
    tail = 2 * z * z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 * (1 / 11 + z2 * (1 / 13))))))
    return 2 * z + tail, tail - y * z


@triton.jit
def tanh(x):
    """Returns tanh(x) with full relative accuracy. triton.language has no tanh."""
    e = expm1_parts(-2 * tl.abs(x))[0]
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def capped(z, softcap):
    """Returns softcap * tanh(z / softcap), but -inf where z is: such an entry is excluded from the vocabulary."""
    return tl.where(z == -float("inf"), z, softcap * tanh(z / softcap))


@triton.jit
def capped_difference(z, y, d, softcap):
    """Returns capped(y) - capped(z), y = z + d, to rounding however far both saturate (`backends/scaling.py`)."""
    rate = -2 / softcap
    e_z, e_y = exp(tl.abs(z) * rate), exp(tl.abs(y) * rate)
    m = tl.where((z > 0) == (y > 0), tl.maximum(e_z, e_y), 1.0)
    gap = 2 * softcap * m * expm1_parts(tl.abs(d) * rate)[0] / ((1 + e_z) * (1 + e_y))
    return tl.where(d < 0, gap, -gap)


@triton.jit
def capped_slope(z, softcap):
    """Returns the derivative of `capped`, 1 - tanh^2, also where tanh rounds to 1."""
    e = exp(tl.abs(z) * (-2 / softcap))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def times_log(p, ratio):
    """Returns p log(ratio); 0 where p = 0."""
    return tl.where(p > 0, p * tl.log(ratio), 0.0)


@triton.jit
def times(p, x):
    """Returns p x; 0 where p = 0, even for infinite x."""
    return tl.where(p > 0, p * x, 0.0)


@triton.jit
def forward_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    gap = tl.where(near, q * e, p - q)
    return tl.where(near, q * (x * e - bend), times(p, x) - gap), -gap


@triton.jit
def reverse_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    q_x = times(q, x)
    return tl.where(near, q * bend, (p - q) - q_x), -q_x


@triton.jit
def jeffreys(x, p, q, near, e, bend, BETA: tl.constexpr):
    gap = tl.where(near, q * e, p - q)
    return tl.where(gap == 0, 0.0, gap * x), -(gap + times(q, x))


@triton.jit
def jsd(x, p, q, near, e, bend, BETA: tl.constexpr):
    m = BETA * p + (1 - BETA) * q
    y = BETA * tl.where(near, e, 0.0)
    log_m, bend_m = log1p_parts(y)  # log(m / q)
    q_log = times_log(q, q / m)
    l = q * (BETA * (1 - BETA) * e * e - BETA * (1 + e) * bend - (1 + y) * bend_m)
    far = BETA * times_log(p, p / m) + (1 - BETA) * q_log
    return tl.where(near, l, far), (1 - BETA) * tl.where(near, -q * log_m, q_log)


@triton.jit
def skew_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 0:
        return forward_kl(x, p, q, near, e, bend, BETA)
    else:
        m = BETA * p + (1 - BETA) * q
        y = BETA * tl.where(near, e, 0.0)
        bend_m = log1p_parts(y)[1]
        gap = tl.where(near, q * e, p - q)
        l = q * ((1 - BETA) * e * e - (1 + e) * (bend + bend_m))
        far = times_log(p, p / m) - (1 - BETA) * gap
        u = -(1 - BETA) * (1 - BETA) * tl.where(near, gap / (1 + y), tl.where(m > 0, gap * (q / m), 0.0))
        return tl.where(near, l, far), u


@triton.jit
def skew_reverse_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 1:
        return reverse_kl(x, p, q, near, e, bend, BETA)
    else:
        m = BETA * p + (1 - BETA) * q
        y = BETA * tl.where(near, e, 0.0)
        log_m, bend_m = log1p_parts(y)
        gap = tl.where(near, q * e, p - q)
        q_log = times_log(q, q / m)
        tilt = BETA * (1 - BETA) * tl.where(near, gap / (1 + y), tl.where(m > 0, gap * (q / m), 0.0))
        return tl.where(near, -q * bend_m, q_log + BETA * gap), tilt + tl.where(near, -q * log_m, q_log)


@triton.jit
def total_variation(x, p, q, near, e, bend, BETA: tl.constexpr):
    gap = tl.where(near, q * e, p - q)
    return tl.abs(gap) / 2, tl.where(gap == 0, 0.0, tl.where(gap > 0, -q / 2, q / 2))


@triton.jit
def alpha_divergence(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 0:
        return forward_kl(x, p, q, near, e, bend, BETA)
    elif BETA == 1:
        return reverse_kl(x, p, q, near, e, bend, BETA)
    else:
        A: tl.constexpr = 1 - BETA
        e_a, bend_a = expm1_parts(A * tl.where(near, x, 0.0))  # (p / q)^a - 1
        # p^a q^(1-a), written so that the exponential cannot overflow
        power = tl.where(x < 0, q * exp(A * tl.minimum(x, 0.0)), p * exp((A - 1) * tl.maximum(x, 0.0)))
        l = tl.where(near, q * (bend_a - A * bend), power - A * p - (1 - A) * q) / (A * (A - 1))
        return l, tl.where(near, -q * e_a, q - power) / A
