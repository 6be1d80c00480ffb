"""Elementwise passes of the torch backend, each over one tile of a chunk: plain functions of tensors.

They run in two ways: eagerly on tiles that fit the processor's cache (backend "torch"), or compiled by Inductor
(backend "torch_compiled"). `torch_chunked` loops over chunks and calls them.

Tiles are `[R, C]` and row vectors `[R]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..divergences import DivergenceTerm

# exp(2 * NEAR) does not overflow fp32. Where q underflows, p = q exp(x) is below exp(NEAR - 87), which is negligible.
# Pairs with a mean KL of 0.1 have rare entries beyond 16.
NEAR = 40.0


def block_softmax(s: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the softmax within the block to `out`. Returns each row's largest logit and log-sum-exp, `[R]` each."""
    top = s.amax(1)
    torch.softmax(s, 1, out=out)
    lse = top - out.amax(1).log()  # a softmax's largest entry is 1 / sum exp(s - max)
    return top, torch.where(torch.isneginf(top), top, lse)  # all entries of the block are excluded


def block_sums(s: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row's largest logit and the sum of exp(s - largest), `[R]` each; a row of -inf has the sum 0."""
    top = s.amax(1)
    return top, (s - top.clamp_min(torch.finfo(s.dtype).min)[:, None]).exp_().sum(1)


def rest_gradient(s: Tensor, lse: Tensor, factor: Tensor, slope: Tensor | None) -> Tensor:
    """Returns exp(s - lse) factor slope, `[R, C]`, for a finite `lse` `[R]`."""
    g = (s - lse[:, None]).exp_().mul_(factor[:, None])
    return g if slope is None else g.mul_(slope)


def difference(d: Tensor, scale: float, q: Tensor, out: Tensor) -> Tensor:
    """Writes `d * scale` to `out`, in `out`'s dtype. Returns its mean under `q`, the block's softmax: `[R]`."""
    y = out.copy_(d) if scale == 1 else torch.mul(d, scale, out=out)
    return torch.linalg.vecdot(q, y)


def centred(mean: Tensor, q: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces d by y = d - mean in place. Returns min y, max y (scalars) and the mean of expm1(y) under `q`, `[R]`."""
    y = out.sub_(mean[:, None])
    low, high = y.aminmax()
    return low, high, torch.linalg.vecdot(q, torch.expm1(y))


def centred_kl(
    term: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], mean: Tensor, q: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `centred`, for a `Shifted.term`: also returns the mean of l under `q`, `[R]`, and replaces d by w in place."""
    y = out - mean[:, None]
    low, high = y.aminmax()
    e = torch.expm1(y, out=out)
    l, w = term(y, e)
    sums = torch.linalg.vecdot(q, e), torch.linalg.vecdot(q, l)
    if w is not e:
        out.copy_(w)
    return low, high, *sums


def near_terms(
    term: DivergenceTerm, beta: float, entry_clip: float | None, q: Tensor, rho: Tensor | None, y: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the sums of l', of the clipped terms and of u, `[R]` each, and u `[R, C]`, from x = y - c."""
    q = q if rho is None else q * rho[:, None]
    x = y - c[:, None]
    l, u = term.centred(x, q, beta)
    k = term.slope(beta)
    return _clipped(l, u, k, entry_clip, q, l if entry_clip is None else _textbook(l, x, q, k))


def far_terms(
    term: DivergenceTerm, beta: float, entry_clip: float | None, log_q: Tensor, t: Tensor, lse_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `near_terms`, from both models' log-softmaxes. `t` is the teacher's logits `[R, C]`."""
    log_p = t - lse_t[:, None]
    absent = torch.isneginf(log_q) & torch.isneginf(log_p)
    q, p, k = log_q.exp(), log_p.exp(), term.slope(beta)
    x = torch.where(absent, 0.0, log_p - log_q)
    plain, u = (torch.where(absent, 0.0, z) for z in term.term(log_p, log_q, beta))
    l, u = plain - k * (p - q), u + k * q
    if term.centred is not None:
        close, near_x = x.abs() < 1, x.clamp(-1, 1)
        near_l, near_u = term.centred(near_x, q, beta)
        l, u = torch.where(close, near_l, l), torch.where(close, near_u, u)
        if entry_clip is not None:
            plain = torch.where(close, _textbook(near_l, near_x, q, k), plain)
    return _clipped(l, u, k, entry_clip, q, plain)


def _textbook(l: Tensor, x: Tensor, q: Tensor, k: float) -> Tensor:
    """Returns the term to which an entry clip applies, l = l' + k (p - q), from the centred one."""
    return l if k == 0 else torch.addcmul(l, q, torch.expm1(x), value=k)


def _clipped(l, u, k: float, entry_clip: float | None, q, plain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = l.sum(1)
    if entry_clip is None:
        return raw, raw, u.sum(1), u
    u = torch.where(plain > entry_clip, k * q, u)
    return raw, plain.clamp_max(entry_clip).sum(1), u.sum(1), u


def gradient(u: Tensor, q: Tensor, sum_u: Tensor, factor: Tensor | None) -> Tensor:
    """Returns (u - q sum_u) factor, `[R, C]`."""
    return _scaled(torch.addcmul(u, q, sum_u[:, None], value=-1), factor)


def shifted_gradient(w: Tensor, q: Tensor, centre: Tensor, factor: Tensor | None, out: Tensor | None) -> None:
    """Writes q (centre - w) factor to `out`; if that is None, over w in place."""
    g = (centre[:, None] - w).mul_(q)
    (w if out is None else out).copy_(_scaled(g, factor))


def _scaled(g: Tensor, factor: Tensor | None) -> Tensor:
    """Multiplies `g` in place by a factor `[R]` or `[R, C]`."""
    return g if factor is None else g.mul_(factor if factor.dim() == 2 else factor[:, None])


@cache
def compiled(function: Callable) -> Callable:
    """Returns `function` compiled by Inductor, once for all sizes. Its tensor arguments must not overlap.

    Inductor of torch 2.13 fails on some passes that also write to an argument; those passes return their tile instead.
    """
    return torch.compile(function, dynamic=True, fullgraph=True)
