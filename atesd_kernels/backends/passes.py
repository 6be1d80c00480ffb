"""The elementwise passes of the torch backend, each over one tile of a chunk: plain functions of tensors.

They are apart from the walk over chunks (`torch_chunked`) because they exist twice: as they stand here, run eagerly on
tiles that fit the processor's cache, and compiled by Inductor (backend "torch_compiled").

Tiles are `[R, C]` and row vectors `[R]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..divergences import DivergenceTerm


def block_softmax(s: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax within the block; the row's largest logit and log-sum-exp."""
    top = s.amax(1)
    torch.softmax(s, 1, out=out)
    lse = top - out.amax(1).log()  # a softmax's largest entry is 1 / sum exp(s - max)
    return top, torch.where(torch.isneginf(top), top, lse)  # a block of nothing but excluded entries


def difference(d: Tensor, scale: float, q: Tensor, out: Tensor) -> Tensor:
    """d scale, as it comes from the product, in the precision of the sweeps; its mean under `q`, a block's softmax."""
    y = out.copy_(d) if scale == 1 else torch.mul(d, scale, out=out)
    return torch.linalg.vecdot(q, y)


def centred(mean: Tensor, q: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = d - mean in the place of d: its extremes, and the mean of expm1(y) under `q`."""
    y = out.sub_(mean[:, None])
    low, high = y.aminmax()
    return low, high, torch.linalg.vecdot(q, torch.expm1(y))


def centred_kl(
    term: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], mean: Tensor, q: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where one look is enough (`Shifted.term`): also the mean of its l, and its w in the place of d."""
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
    """Sums of l, of the clipped terms and of u, and u itself, from x = y - c."""
    q = q if rho is None else q * rho[:, None]
    x = y - c[:, None]
    l, u = term.centred(x, q, beta)
    return _clipped(l, u, term.slope(beta), entry_clip, q, x)


def far_terms(
    term: DivergenceTerm, beta: float, entry_clip: float | None, log_q: Tensor, t: Tensor, lse_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from both log-softmaxes, with `t` the teacher's logits."""
    log_p = t - lse_t[:, None]
    absent = torch.isneginf(log_q) & torch.isneginf(log_p)
    q, p, k = log_q.exp(), log_p.exp(), term.slope(beta)
    x = torch.where(absent, 0.0, log_p - log_q)
    l, u = term.term(log_p, log_q, beta)
    l, u = torch.where(absent, 0.0, l - k * (p - q)), torch.where(absent, 0.0, u + k * q)
    if term.centred is not None:
        near_l, near_u = term.centred(x.clamp(-1, 1), q, beta)
        close = x.abs() < 1
        l, u = torch.where(close, near_l, l), torch.where(close, near_u, u)
    return _clipped(l, u, k, entry_clip, q, x)


def _clipped(l, u, k: float, entry_clip: float | None, q, x) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = l.sum(1)
    if entry_clip is None:
        return raw, raw, u.sum(1), u
    # a clip looks at the textbook term, l = l' + k (p - q)
    plain = l if k == 0 else torch.addcmul(l, q, torch.expm1(x), value=k)
    u = torch.where(plain > entry_clip, k * q, u)
    return raw, plain.clamp_max(entry_clip).sum(1), u.sum(1), u


def gradient(u: Tensor, q: Tensor, sum_u: Tensor, factor: Tensor | None) -> Tensor:
    """(u - q sum_u) factor."""
    return _scaled(torch.addcmul(u, q, sum_u[:, None], value=-1), factor)


def shifted_gradient(w: Tensor, q: Tensor, centre: Tensor, factor: Tensor | None, out: Tensor | None) -> None:
    """q (centre - w) factor, into `out`, or in the place of w if that is None."""
    g = (centre[:, None] - w).mul_(q)
    (w if out is None else out).copy_(_scaled(g, factor))


def _scaled(g: Tensor, factor: Tensor | None) -> Tensor:
    """Times a factor `[R]` or `[R, C]`."""
    return g if factor is None else g.mul_(factor if factor.dim() == 2 else factor[:, None])


@cache
def compiled(function: Callable) -> Callable:
    """`function` through Inductor, once for all sizes. None of its tensors may overlap another.

    Inductor of torch 2.13 fails on some passes that also write into an argument: those return their tile instead.
    """
    return torch.compile(function, dynamic=True, fullgraph=True)
