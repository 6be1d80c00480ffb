"""Shorter forms of the terms in `terms.py`, for rows without a large x = log p - log q. Values agree to rounding.

In such rows p = q (1 + e), q e never overflows, and most near forms hold for every x. Far below 0 they cancel terms as
large as x; this costs |x| ulps of an entry that the teacher excludes. `rows.py` uses these forms if the row allows it,
and the term itself if it has no shorter form.
"""

import triton
import triton.language as tl

from .terms import expm1_parts, log1p_parts, reciprocal


@triton.jit
def log_mixture(e, near, BETA: tl.constexpr):
    """Returns y = BETA e, log(m / q) = log1p(y) with m = BETA p + (1 - BETA) q, and log1p(y) - y."""
    y = BETA * e
    near_log, near_bend = log1p_parts(y)
    far_log = tl.log(1 + y)
    return y, tl.where(near, near_log, far_log), tl.where(near, near_bend, far_log - y)


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
    y, log_m, bend_m = log_mixture(e, near, BETA)
    close = BETA * ((1 - BETA) * e * e - (1 + e) * bend) - (1 + y) * bend_m
    far = BETA * (1 + e) * (x - log_m) - (1 - BETA) * log_m
    return q * tl.where(near, close, far), (BETA - 1) * q * log_m


@triton.jit
def skew_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 0:
        return forward_kl(x, p, q, near, e, bend, BETA)
    else:
        y, log_m, bend_m = log_mixture(e, near, BETA)
        close = (1 - BETA) * e * e - (1 + e) * (bend + bend_m)
        far = (1 + e) * (x - log_m) - (1 - BETA) * e
        return q * tl.where(near, close, far), -(1 - BETA) * (1 - BETA) * q * e * reciprocal(1 + y)


@triton.jit
def skew_reverse_kl(x, p, q, near, e, bend, BETA: tl.constexpr):
    if BETA == 1:
        return reverse_kl(x, p, q, near, e, bend, BETA)
    else:
        y, log_m, bend_m = log_mixture(e, near, BETA)
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
