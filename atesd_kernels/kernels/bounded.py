"""Shorter forms of the terms in `terms.py`, for rows without a large x = log p - log q. Values agree to rounding.

In such rows p = q (1 + e), q e never overflows, and most near forms hold for every x. Far below 0 they cancel terms as
large as x; this costs |x| ulps of an entry that the teacher excludes. `rows.py` uses these forms if the row allows it,
and the term itself if it has no shorter form.
"""

import triton
import triton.language as tl

from .terms import expm1_parts, reciprocal

# bits of fp32 numbers
ONE = tl.constexpr(0x3F800000)
THREE_QUARTERS = tl.constexpr(0x3F400000)
EXPONENT = tl.constexpr(-0x800000)  # 0xFF800000
LOG_2_PER_UNIT = tl.constexpr(0.6931471805599453 / 0x800000)


@triton.jit
def log_mixture(e, BETA: tl.constexpr):
    """Returns y = BETA e, log(m / q) = log1p(y) with m = BETA p + (1 - BETA) q, and log1p(y) - y, to rounding.

    1 + y = 2^k (1 + r) with r in [-1/4, 1/2), so one polynomial serves every y. Where k = 0, r = y and nothing cancels.
    """
    y = BETA * e
    k = ((1 + y).to(tl.int32, bitcast=True) - THREE_QUARTERS) & EXPONENT  # k times 2^23
    power = (-k + ONE).to(tl.float32, bitcast=True)  # 2^-k; the constant stands second for the interpreter
    r = y * power + (power - 1)
    # (log1p(r) - r) / r^2 on [-1/4, 1/2]: the degree-8 polynomial with the smallest relative error, 4.9e-8
    g = -0.13135065138339996 + r * (0.10691220313310623 + r * -0.04801256209611893)
    g = 0.19993747770786285 + r * (-0.1664590835571289 + r * (0.14432336390018463 + r * g))
    bend = r * r * (-0.5 + r * (0.33333393931388855 + r * (-0.25000202655792236 + r * g)))
    log_m = k.to(tl.float32) * LOG_2_PER_UNIT + (r + bend)
    return y, log_m, tl.where(k == 0, bend, log_m - y)


@triton.jit
def forward_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    return q * (x * e - bend), -q * e


@triton.jit
def reverse_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    return q * bend, -q * x


@triton.jit
def jeffreys(x, p, q, near, e, bend, BETA: tl.constexpr):
    return q * (e * x), -q * (e + x)


@triton.jit
def jsd(x, p, q, near, e, bend, BETA: tl.constexpr):
    y, log_m, bend_m = log_mixture(e, BETA)
    close = BETA * ((1 - BETA) * e * e - (1 + e) * bend) - (1 + y) * bend_m
    far = BETA * (1 + e) * (x - log_m) - (1 - BETA) * log_m
    return q * tl.where(near, close, far), (BETA - 1) * q * log_m


@triton.jit
def skew_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 0:
        return forward_kl(x, p, q, near, e, bend, BETA)
    else:
        y, log_m, bend_m = log_mixture(e, BETA)
        close = (1 - BETA) * e * e - (1 + e) * (bend + bend_m)
        far = (1 + e) * (x - log_m) - (1 - BETA) * e
        return q * tl.where(near, close, far), -(1 - BETA) * (1 - BETA) * q * e * reciprocal(1 + y)


@triton.jit
def skew_reverse_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 1:
        return reverse_kl(x, p, q, near, e, bend, BETA)
    else:
        y, log_m, bend_m = log_mixture(e, BETA)
        return -q * bend_m, q * ((1 - BETA) * y * reciprocal(1 + y) - log_m)


@triton.jit
def total_variation(x, p, q, near, e, bend, BETA: tl.constexpr):
    return q * tl.abs(e) / 2, tl.where(e == 0, 0.0, tl.where(e > 0, -q / 2, q / 2))


@triton.jit
def alpha_divergence(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 0:
        return forward_kl(x, p, q, near, e, bend, BETA)
    elif BETA == 1:
        return reverse_kl(x, p, q, near, e, bend, BETA)
    else:
        A: tl.constexpr = 1 - BETA
        e_a, bend_a = expm1_parts(A * x)  # (p / q)^A - 1
        return q * (bend_a - A * bend) * (1 / (A * (A - 1))), q * e_a * (-1 / A)
