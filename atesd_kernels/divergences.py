"""The divergences: term, derivative and Triton function of each.

A divergence between a teacher `p` and a student `q` is a sum of terms over the vocabulary, `D = sum_v l_v`. A backend
needs the term and its derivative by the student's log-probability, `u_v = dl_v / d log q_v`. Loss, gradient, clips,
weights and statistics follow from these two (see `torch_chunked`).

Self-distillation compares nearly equal distributions. There the textbook forms of `l` and `u` are differences of almost
equal numbers. For an f-divergence, `D = sum q f(r)` with `r = p/q`, adding a multiple of `sum (p - q) = 0` does not
change D. So we also write the *centred* pair. At `p = q` its values vanish to second and first order:

    l' = l - k (p - q),    u' = u + k q,    k = f'(1),     x = log p - log q,    e = expm1(x) = (p - q) / q
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
_BY_KEY: dict[str, DivergenceTerm] = {}


@dataclass(frozen=True)
class Shifted:
    """Computes D and dD/ds from centred logit differences y, so the sweep need not know c = lse_t - lse_s.

    `y` is the logit difference minus its mean under `q`, and `e = expm1(y)`. The sweep sums `E = sum q e` and
    `L = sum q l`. Then `x = y - log1p(E)`.

    Attributes:
        term: `(y, e) -> (l, w)`, elementwise; `w` is `y` or `e`.
        finish: `(L, E) -> (D, a, scale)`, `[R]` each, such that `dD/ds = scale q (a - w)`.
    """

    term: Callable[[Tensor, Tensor], Pair]
    finish: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class DivergenceTerm:
    """One divergence: its term and derivative, in one or more forms.

    Attributes:
        name: the name users pass as `divergence=`.
        term: `(log_p, log_q, beta) -> (l, u)`, elementwise, any shape and floating dtype. The definition.
        centred: `(x, q, beta) -> (l', u')`, accurate where `p` and `q` nearly agree. Optional: without it the backends
            use `term`, which is correct but loses digits at small divergences.
        slope: `(beta) -> k`, the multiple of `p - q` that `centred` subtracts from `l`.
        shifted: a `Shifted` form, if the dependence on `c = lse_t - lse_s` factors out. Optional: it saves one sweep.
        derivative_sum: the sum of `u'` over the vocabulary, if it is known before the sweep that would sum it: "zero"
            (as of forward KL), or "reverse_kl", which is KL(q || p) (as of reverse KL and Jeffreys). Optional: backend
            "triton" then computes loss and gradient in one sweep. A wrong value gives a wrong gradient.
        smooth: False if `u` jumps at `p = q`. Logit differences are then fp32.
        triton: `"module:function"` of the `@triton.jit` function. Optional: without it the torch backend is used.
        needs_beta: `(beta) -> None`, raises ValueError if the divergence is undefined for this beta.
        key: a string by which operators, which take plain values only, look up this object. Objects with a key live as
            long as the process: create a divergence once, not at each step.
    """

    name: str
    term: Callable[[Tensor, Tensor, float], Pair]
    centred: Callable[[Tensor, Tensor, float], Pair] | None = None
    slope: Callable[[float], float] = lambda beta: 0.0
    shifted: Shifted | None = None
    derivative_sum: str | None = None
    smooth: bool = True
    triton: str | None = None
    needs_beta: Callable[[float], None] = lambda beta: None
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.derivative_sum not in (None, "zero", "reverse_kl"):
            raise ValueError(f"derivative_sum must be 'zero', 'reverse_kl' or None, got {self.derivative_sum!r}.")
        key = self.name if self.name not in _BY_KEY else f"{self.name}#{len(_BY_KEY)}"
        object.__setattr__(self, "key", key)
        _BY_KEY[key] = self


def times_log(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Returns `p * log_ratio`; 0 where `p = 0`, because an impossible token contributes nothing."""
    return p * torch.where(p > 0, log_ratio, 0.0)  # where() is the inner function, so autograd gets 0 and not NaN


# Forward KL, KL(p || q): f(r) = r log r, k = 1.
def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    p = log_p.exp()
    return times_log(p, log_p - log_q), -p


def forward_kl_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    e = torch.expm1(x)
    return torch.addcmul(x, x, e).sub_(e).mul_(q), -(q * e)


# sum p x = (L + E) / (1 + E) - log1p(E), and q - p = q (E - e) / (1 + E).
def forward_kl_shifted(y: Tensor, e: Tensor) -> Pair:
    return torch.addcmul(y, y, e).sub_(e), e


def forward_kl_finish(L: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    near = (L - E * E) / (1 + E) + log1p_remainder(E)
    return torch.where(E < 0.5, near, (L + E) / (1 + E) - torch.log1p(E)), E, 1 / (1 + E)


# Reverse KL, KL(q || p): f(r) = -log r, k = -1.
def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    q = log_q.exp()
    l = times_log(q, log_q - log_p)
    return l, l + q


def reverse_kl_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    return (torch.expm1(x) - x).mul_(q), -(q * x)


# -sum q x = log1p(E), as sum q y = 0, and the gradient is -q y.
def reverse_kl_shifted(y: Tensor, e: Tensor) -> Pair:
    return e - y, y


def reverse_kl_finish(L: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.where(E < 0.5, L - log1p_remainder(E), torch.log1p(E)), torch.zeros_like(E), torch.ones_like(E)


# Generalised Jensen-Shannon, beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: k = 0.
def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(log_p, log_q, beta)
    u = (1 - beta) * times_log(q, log_q - log_m)
    return beta * times_log(p, log_p - log_m) + u, u


def jsd_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    e = torch.expm1(x)
    log_m = torch.log1p(beta * e)  # log(m / q)
    u = (log_m * q).mul_(beta - 1)
    return ((x - log_m).mul_(beta * q).mul_(e + 1)).add_(u), u


# Jeffreys, KL(p || q) + KL(q || p): f(r) = (r - 1) log r, k = 0.
def jeffreys(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    (l_f, u_f), (l_r, u_r) = forward_kl(log_p, log_q, beta), reverse_kl(log_p, log_q, beta)
    return l_f + l_r, u_f + u_r


def jeffreys_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    e = torch.expm1(x)
    return x * e * q, (e + x).mul_(q).neg_()


# Skew KL, KL(p || beta p + (1 - beta) q): k = 1 - beta. beta = 0 is forward KL.
def skew_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    p = log_p.exp()
    log_m = _log_mixture(log_p, log_q, beta)
    return times_log(p, log_p - log_m), (beta - 1) * times_log(p, (log_q - log_m).exp())


def skew_kl_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    e = torch.expm1(x)
    b_e = beta * e
    l = (x - torch.log1p(b_e)).mul_(e + 1).sub_(e, alpha=1 - beta).mul_(q)
    return l, (e * q).mul_(-((1 - beta) ** 2)).div_(b_e + 1)


# Skew reverse KL, KL(q || (1 - beta) q + beta p): k = -beta. beta = 1 is reverse KL.
def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    q = log_q.exp()
    log_m = _log_mixture(log_p, log_q, beta)
    l = times_log(q, log_q - log_m)
    return l, l + beta * times_log(q, (log_p - log_m).exp())


def skew_reverse_kl_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    b_e = beta * torch.expm1(x)
    log_m = torch.log1p(b_e)
    u = (b_e * (1 - beta)).div_(b_e + 1).sub_(log_m).mul_(q)
    return (b_e - log_m).mul_(q), u


# Total variation, sum |p - q| / 2. Its derivative jumps at p = q.
def total_variation(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    p, q = log_p.exp(), log_q.exp()
    return (p - q).abs() / 2, q * torch.sign(q - p) / 2


def total_variation_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    return (torch.expm1(x) * q).abs_().div_(2), torch.sign(x).mul_(q).mul_(-0.5)


# Alpha divergence with a = 1 - beta: (sum p^a q^(1-a) - 1) / (a (a - 1)), written with the non-negative term
# f(r) = (r^a - 1 - a (r - 1)) / (a (a - 1)), so its term is already centred: k = 0.
# beta = 0 is forward KL, beta = 1 reverse KL, beta = 1/2 four times the squared Hellinger distance.
def alpha_divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Pair:
    a = 1 - beta
    p, q = log_p.exp(), log_q.exp()
    if a == 1:
        l, u = forward_kl(log_p, log_q, beta)
        return l - (p - q), u + q
    if a == 0:
        l, u = reverse_kl(log_p, log_q, beta)
        return l + (p - q), u - q
    power = torch.where((p > 0) & (q > 0), (a * log_p + (1 - a) * log_q).exp(), 0.0)
    return (power - a * p - (1 - a) * q) / (a * (a - 1)), (q - power) / a


def alpha_divergence_centred(x: Tensor, q: Tensor, beta: float) -> Pair:
    a = 1 - beta
    if a == 1:
        return forward_kl_centred(x, q, beta)
    if a == 0:
        return reverse_kl_centred(x, q, beta)
    e_a = torch.expm1(a * x)  # r^a - 1
    return (e_a - a * torch.expm1(x)).mul_(q / (a * (a - 1))), (e_a * q).mul_(-1 / a)


def log1p_remainder(E: Tensor) -> Tensor:
    """Returns `E - log1p(E)`, accurate for small `E`: `log1p(E) = 2 atanh(h)` with `h = E / (2 + E)`."""
    h = E / (2 + E)
    h2 = h * h
    series = 2 * h * h2 * (1 / 3 + h2 * (1 / 5 + h2 * (1 / 7 + h2 * (1 / 9 + h2 * (1 / 11 + h2 / 13)))))
    return torch.where(h.abs() < 0.1, E * h - series, E - torch.log1p(E))


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns `log(beta p + (1 - beta) q)`; -inf where neither distribution has mass."""
    if beta == 0:
        return log_q
    if beta == 1:
        return log_p
    weight = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
    return torch.logaddexp(log_p + weight[0], log_q + weight[1])


def _skew_kl_beta(beta: float) -> None:
    if beta == 1:
        raise ValueError("skew_kl with beta=1 is KL(p || p), always zero; use beta < 1 (beta=0 is forward KL).")


def _skew_reverse_kl_beta(beta: float) -> None:
    if beta == 0:
        raise ValueError("skew_reverse_kl with beta=0 is KL(q || q), always zero; use beta > 0 (beta=1 is reverse KL).")


_TRITON = "atesd_kernels.kernels.terms"
FORWARD_KL = DivergenceTerm(
    "forward_kl",
    forward_kl,
    forward_kl_centred,
    slope=lambda beta: 1.0,
    shifted=Shifted(forward_kl_shifted, forward_kl_finish),
    derivative_sum="zero",
    triton=f"{_TRITON}:forward_kl",
)
REVERSE_KL = DivergenceTerm(
    "reverse_kl",
    reverse_kl,
    reverse_kl_centred,
    slope=lambda beta: -1.0,
    shifted=Shifted(reverse_kl_shifted, reverse_kl_finish),
    derivative_sum="reverse_kl",
    triton=f"{_TRITON}:reverse_kl",
)
JEFFREYS = DivergenceTerm(
    "jeffreys", jeffreys, jeffreys_centred, derivative_sum="reverse_kl", triton=f"{_TRITON}:jeffreys"
)
_REGISTRY: dict[str, DivergenceTerm] = {
    d.name: d
    for d in (
        FORWARD_KL,
        REVERSE_KL,
        JEFFREYS,
        DivergenceTerm("jsd", jsd, jsd_centred, triton=f"{_TRITON}:jsd"),
        DivergenceTerm(
            "skew_kl",
            skew_kl,
            skew_kl_centred,
            slope=lambda beta: 1 - beta,
            triton=f"{_TRITON}:skew_kl",
            needs_beta=_skew_kl_beta,
        ),
        DivergenceTerm(
            "skew_reverse_kl",
            skew_reverse_kl,
            skew_reverse_kl_centred,
            slope=lambda beta: -beta,
            triton=f"{_TRITON}:skew_reverse_kl",
            needs_beta=_skew_reverse_kl_beta,
        ),
        DivergenceTerm(
            "total_variation",
            total_variation,
            total_variation_centred,
            smooth=False,
            triton=f"{_TRITON}:total_variation",
        ),
        DivergenceTerm("alpha", alpha_divergence, alpha_divergence_centred, triton=f"{_TRITON}:alpha_divergence"),
    )
}


BUILT_IN = frozenset(_REGISTRY)


def register_divergence(term: DivergenceTerm) -> DivergenceTerm:
    """Registers your own divergence, so that every loss accepts its name. Returns `term`.

    Registering one of your names again replaces it, for instance when you rerun a notebook cell. You can also pass a
    `DivergenceTerm` as `divergence=` without registering it.

    Args:
        term: name and mathematics. `term.term` receives `(log_p, log_q, beta)` and returns `(l, u)`.

    Raises:
        ValueError: if the name is one of this package's own.

    Example:
        >>> import torch
        >>> from atesd_kernels import DivergenceTerm, register_divergence
        >>> def squared(log_p, log_q, beta):  # sum (p - q)^2
        ...     p, q = log_p.exp(), log_q.exp()
        ...     return (p - q) ** 2, 2 * q * (q - p)
        >>> register_divergence(DivergenceTerm("squared", squared)).name
        'squared'
    """
    if term.name in BUILT_IN and term is not _REGISTRY[term.name]:
        raise ValueError(f"divergence {term.name!r} is one of this package's own; give yours another name.")
    _REGISTRY[term.name] = term
    return term


def get_divergence(divergence: str | DivergenceTerm, beta: float) -> DivergenceTerm:
    """Returns the named or given term, after checking `beta`. JSD at beta 0 is forward KL, at 1 reverse KL."""
    if isinstance(divergence, str):
        if divergence not in _REGISTRY:
            known = [*sorted(BUILT_IN), *sorted(_REGISTRY.keys() - BUILT_IN)]
            raise ValueError(f"unknown divergence {divergence!r}; known: {', '.join(known)}.")
        term = _REGISTRY[divergence]
    elif isinstance(divergence, DivergenceTerm):
        term = divergence
    else:
        raise TypeError(f"divergence must be a name or a DivergenceTerm, got {type(divergence).__name__}.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}.")
    if term.key == "jsd" and beta in (0, 1):
        return REVERSE_KL if beta else FORWARD_KL
    term.needs_beta(beta)
    return term


def term_of_key(key: str) -> DivergenceTerm:
    """Returns the term with this `key`."""
    return _BY_KEY[key]
