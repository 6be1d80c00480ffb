"""The divergence over a teacher's top K entries and the rest: what the top-k losses compute beside their sweeps.

The backends sweep the vocabulary. They give each row the student's logits at the K ids, and `rest`, the log-sum-exp of
all its other logits. The loss is a function of these K + 1 numbers. Given its derivative g by each of them, the
gradient by a logit j outside the ids is a share of the rest's:

    dD/ds_j = softmax_rest(s)_j g_rest = (q_j / q_rest) u_rest - q_j sum u

All of it is float64: K + 1 numbers a row cost little, and a rest that nearly agrees with the teacher's keeps its
digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import BUILT_IN
from ..spec import TopkSpec
from . import passes

LEAST_REST = 1e-6  # of the teacher's mass (our choice): less is noise in the fp32 log-probabilities that servers send
BYTES_PER_ENTRY = 120  # of float64 temporaries for each listed entry


class TopkResult(NamedTuple):
    """Values of `R` rows and their derivatives by the K + 1 numbers."""

    value: Tensor  # [R] after clips
    raw: Tensor  # [R] before clips
    grad: Tensor  # [R, K] by the logits at the ids
    grad_rest: Tensor  # [R] by `rest`


class Student(NamedTuple):
    """What a sweep finds about the student, in float64. `-inf` where an id is padding."""

    s: Tensor  # [R, K] scaled logits at the ids
    rest: Tensor  # [R] log-sum-exp of the scaled logits at all other entries

    @property
    def lse(self) -> Tensor:
        return torch.logaddexp(self.s.logsumexp(1), self.rest)


def compare(spec: TopkSpec, student: Student, log_p: Tensor) -> TopkResult:
    """Returns the divergence from the teacher's log-probabilities `log_p` `[R, K]`, -inf where an id is padding."""
    log_q, t, lse_t = _entries(spec.tail, student, log_p)
    term, k = spec.term, spec.term.slope(spec.beta)
    raw, value, sum_u, u = passes.far_terms(term, spec.beta, spec.entry_clip, log_q, t, lse_t)
    q, is_sum = log_q.exp(), spec.tail == "ignore"
    if is_sum:  # k (p - q) does not cancel over some of the entries
        u = u - k * q
        raw, sum_u = raw + k * (log_p.exp() - q).sum(1), u.sum(1)
        value = raw if spec.entry_clip is None else value
    elif spec.divergence in BUILT_IN:  # rounding of a sum of non-negative terms
        raw = raw.clamp_min(0)
        value = raw if spec.entry_clip is None else value
    grad = u - q * sum_u[:, None]
    if is_sum:
        grad_rest = -(student.rest - student.lse).exp() * sum_u
    else:
        grad_rest = grad[:, -1] if spec.tail == "bucket" else torch.zeros_like(value)
    grad = grad[:, : student.s.shape[1]]
    if spec.token_clip is not None:
        below = value <= spec.token_clip
        grad, grad_rest = torch.where(below[:, None], grad, 0.0), torch.where(below, grad_rest, 0.0)
        value = value.clamp_max(spec.token_clip)
    return TopkResult(value, raw, grad, grad_rest)


def _entries(tail: str, student: Student, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log q, the teacher's logits (`[R, K + 1]` with a rest, else `[R, K]`), and their log-sum-exp `[R]`."""
    if tail == "bucket":
        s, t = with_last(student.s, student.rest), with_last(log_p, teacher_rest(log_p, student.rest))
        return s - finite_lse(s)[:, None], t, finite_lse(t)
    if tail == "renormalise":
        return student.s - finite_lse(student.s)[:, None], log_p, finite_lse(log_p)
    return student.s - student.lse[:, None], log_p, torch.zeros_like(student.rest)


def with_last(entries: Tensor, last: Tensor) -> Tensor:
    return torch.cat([entries, last[:, None]], 1)


def teacher_rest(log_p: Tensor, student_rest: Tensor) -> Tensor:
    """Returns the logarithm of the teacher's mass outside the ids, `[R]`: -inf where the ids cover the student's
    vocabulary, else at least that of LEAST_REST."""
    rest = (1 - log_p.exp().sum(1)).clamp_min(LEAST_REST).log()
    return torch.where(torch.isneginf(student_rest), student_rest, rest)


def finite_lse(entries: Tensor) -> Tensor:
    """Returns the rows' log-sum-exp; 0 where every entry is -inf, because -inf - -inf is NaN."""
    lse = entries.logsumexp(1)
    return torch.where(torch.isneginf(lse), 0.0, lse)


class Extremes(NamedTuple):
    """What statistics need of the sweep beside `Student`, in float64, `[R]` each."""

    entropy_rest: Tensor  # sum of -q log q outside the ids
    top_rest: Tensor  # the largest logit outside the ids
    at_target: Tensor | None  # the target's logit


def statistics(
    spec: TopkSpec, student: Student, extremes: Extremes, raw: Tensor, log_p: Tensor, ids: Tensor, target: Tensor | None
) -> Tensor:
    """Returns `[len(TokenStats), R]`. `ids` `[R, K]` and `target` `[R]` number the whole vocabulary."""
    lse = student.lse
    t = log_p if spec.tail == "renormalise" else with_last(log_p, teacher_rest(log_p, student.rest))
    entropy_t = torch.special.entr((t - finite_lse(t)[:, None]).exp()).sum(1)
    entropy_s = torch.special.entr((student.s - lse[:, None]).exp()).sum(1) + extremes.entropy_rest
    top = torch.maximum(student.s.amax(1), extremes.top_rest)
    best = log_p.argmax(1, keepdim=True)  # the teacher's
    agree = (student.s.gather(1, best)[:, 0] == top) & (log_p > -torch.inf).any(1)
    logprob_s = logprob_t = torch.zeros_like(lse)
    if target is not None:
        logprob_s = extremes.at_target - lse
        hit = ids == target[:, None]
        logprob_t = torch.where(hit, log_p, -torch.inf).amax(1)
        logprob_t = torch.where(hit.any(1), logprob_t, torch.nan)
    return torch.stack([raw, entropy_s, entropy_t, logprob_s, logprob_t, (top - lse).exp(), agree.to(lse.dtype)])
