"""Dense float64 oracle: a slow, simple definition of every operator. Tests compare every backend against it.

It materialises `[tokens, vocab]` tensors and gets gradients from torch autograd. It shares with the backends only each
divergence's definition, not the hand-written derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import DivergenceTerm, get_divergence
from .stats import TokenStats


def logits(hidden, weight, bias=None, softcap=None, temperature=1.0) -> Tensor:
    """Returns `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature` in float64, `[..., V]`.

    A softcap leaves entries at -inf where they are: they are excluded from the vocabulary.
    """
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    return scaled(z, softcap, temperature)


def scaled(z: Tensor, softcap: float | None, temperature: float) -> Tensor:
    if softcap is not None:
        z = torch.where(torch.isneginf(z), z, softcap * torch.tanh(z / softcap))
    return z / temperature


def token_divergence(
    s: Tensor,
    t: Tensor,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    entry_clip: float | None = None,
    token_clip: float | None = None,
) -> Tensor:
    """Returns the divergence of each token, `[...]`, from float64 logits `s`, `t` `[..., V]`."""
    log_q, log_p = log_softmax_pair(s, t)
    return summed_terms(log_p, log_q, divergence=divergence, beta=beta, entry_clip=entry_clip, token_clip=token_clip)


def summed_terms(
    log_p: Tensor, log_q: Tensor, *, divergence="forward_kl", beta=0.5, entry_clip=None, token_clip=None
) -> Tensor:
    """Returns the sum of the clipped terms, `[...]`, clipped in turn, from log-probabilities `[..., V]`."""
    entries = get_divergence(divergence, beta).term(log_p, log_q, beta)[0]
    if entry_clip is not None:
        entries = torch.where(entries <= entry_clip, entries, entry_clip)
    tokens = entries.sum(-1)
    if token_clip is not None:
        tokens = torch.where(tokens <= token_clip, tokens, token_clip)
    return tokens


def log_softmax_pair(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both log-softmaxes, `[..., V]`. Entries at -inf in both get a finite value with exponential exactly 0."""
    absent = torch.isneginf(s) & torch.isneginf(t)
    s, t = (z.masked_fill(absent, -1e4) for z in (s, t))
    return s.log_softmax(-1), t.log_softmax(-1)


def reduce(tokens: Tensor, mask=None, token_weight=None, reduction="mean", num_tokens=None) -> Tensor:
    """Reduces per-token values as the losses do: masked tokens are exactly 0; the mean is over unmasked tokens."""
    if mask is not None:
        tokens = torch.where(mask.bool(), tokens, 0.0)
    if token_weight is not None:
        tokens = tokens * token_weight.double()
    if reduction == "none":
        return tokens
    if reduction == "sum":
        return tokens.sum()
    counted = tokens.numel() if mask is None else int(mask.sum())
    return tokens.sum() / (max(counted, 1) if num_tokens is None else num_tokens)


def linear_divergence(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight=None,
    *,
    teacher_mix=None,
    temperature=1.0,
    teacher_temperature=None,
    student_bias=None,
    teacher_bias=None,
    softcap=None,
    mask=None,
    token_weight=None,
    reduction="mean",
    num_tokens=None,
    **divergence_options,
) -> Tensor:
    """Dense float64 version of `atesd_kernels.linear_divergence`. The teacher gets no gradient."""
    s, t = logit_pair(
        student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_mix=teacher_mix,
        temperature=temperature, teacher_temperature=teacher_temperature, student_bias=student_bias,
        teacher_bias=teacher_bias, softcap=softcap,
    )  # fmt: skip
    return reduce(token_divergence(s, t, **divergence_options), mask, token_weight, reduction, num_tokens)


def logit_pair(
    student_hidden, student_weight, teacher_hidden, teacher_weight=None, *, teacher_mix=None, temperature=1.0,
    teacher_temperature=None, student_bias=None, teacher_bias=None, softcap=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns both models' scaled logits, `[..., V]` float64. The teacher's have no gradient."""

    @torch.no_grad()
    def view(hidden, weight, bias):
        own = weight is not None
        bias = bias if own or bias is not None else student_bias
        return logits(hidden, weight if own else student_weight, bias, softcap)

    s = logits(student_hidden, student_weight, student_bias, softcap, temperature)
    if teacher_mix is None:
        t = view(teacher_hidden, teacher_weight, teacher_bias)
    else:
        heads, biases = (x if isinstance(x, (list, tuple)) else [x] * len(teacher_hidden)
                         for x in (teacher_weight, teacher_bias))  # fmt: skip
        t, absent = mixture([view(*v) for v in zip(teacher_hidden, heads, biases, strict=True)], teacher_mix)
        s = s.masked_fill(absent, -torch.inf)
    return s, t / (teacher_temperature or temperature)


def mixture(views: list[Tensor], mix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `sum_m w_m z_m` `[..., V]` for logits `z_m` `[..., V]` and weights `[M]` or `[M, ...]`, divided by their
    sum; and the mask of entries at -inf in any view, which are excluded from the mixture."""
    z = torch.stack(views)
    absent = torch.isneginf(z).any(0)
    w = mix.double() / mix.double().sum(0)
    w = w.reshape(*w.shape, *[1] * (z.dim() - w.dim()))
    return (w * z.masked_fill(absent, 0.0)).sum(0).masked_fill(absent, -torch.inf), absent


def linear_logprobs(hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None, mask=None) -> Tensor:
    """Dense float64 version of `atesd_kernels.linear_logprobs`."""
    log_q = logits(hidden, weight, bias, softcap, temperature).log_softmax(-1)
    return reduce(log_q.gather(-1, targets.long().clamp_min(0).unsqueeze(-1)).squeeze(-1), mask, reduction="none")


def linear_topk_divergence(
    student_hidden,
    student_weight,
    teacher_ids,
    teacher_logprobs,
    *,
    tail="bucket",
    temperature=1.0,
    student_bias=None,
    softcap=None,
    mask=None,
    token_weight=None,
    reduction="mean",
    num_tokens=None,
    **divergence_options,
) -> Tensor:
    """Dense float64 version of `atesd_kernels.linear_topk_divergence`."""
    log_q = logits(student_hidden, student_weight, student_bias, softcap, temperature).log_softmax(-1)
    q_entries, p_entries = topk_entries(log_q, teacher_ids, teacher_logprobs, with_rest=tail == "bucket")
    if tail == "ignore":
        absent = torch.isneginf(q_entries) & torch.isneginf(p_entries)
        pair = (z.masked_fill(absent, -1e4) for z in (p_entries, q_entries))
        tokens = summed_terms(*pair, **divergence_options)
    else:
        tokens = token_divergence(q_entries, p_entries, **divergence_options)
    return reduce(tokens, mask, token_weight, reduction, num_tokens)


def topk_entries(log_q: Tensor, ids: Tensor, logprobs: Tensor, with_rest: bool) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of student and teacher at the ids, `[..., K]`, then of the rest. -inf: padding."""
    padding, places = ids < 0, ids.long().clamp_min(0)
    p = logprobs.double().masked_fill(padding, -torch.inf)
    q = log_q.gather(-1, places).masked_fill(padding, -torch.inf)
    if not with_rest:
        return q, p
    listed = torch.zeros_like(log_q).scatter_add(-1, places, (~padding).to(log_q.dtype)) > 0
    others = log_q.masked_fill(listed, -torch.inf)
    none = torch.isneginf(others).all(-1, keepdim=True)
    rest_q = others.masked_fill(none, 0).logsumexp(-1, keepdim=True).masked_fill(none, -torch.inf)
    rest_p = (1 - p.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log().masked_fill(none, -torch.inf)
    return torch.cat([q, rest_q], -1), torch.cat([p, rest_p], -1)


def token_stats(s: Tensor, t: Tensor, targets=None, *, divergence="forward_kl", beta=0.5) -> TokenStats:
    """Returns `TokenStats` of float64 logits `[..., V]`."""
    log_q, log_p = log_softmax_pair(s, t)

    def at_target(log_probs):
        return None if targets is None else log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    return TokenStats(
        divergence=token_divergence(s, t, divergence=divergence, beta=beta),
        student_entropy=-(log_q.exp() * log_q).sum(-1),
        teacher_entropy=-(log_p.exp() * log_p).sum(-1),
        student_logprob=at_target(log_q),
        teacher_logprob=at_target(log_p),
        student_top1_prob=log_q.amax(-1).exp(),
        top1_agree=s.argmax(-1) == t.argmax(-1),
    )
