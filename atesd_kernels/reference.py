"""The dense float64 oracle: slow, obvious, the meaning of every op.

It holds whole `[tokens, vocab]` tensors and takes its gradients from torch autograd, so it shares with the backends
nothing but each divergence's definition, and not its hand-written derivative. Tests compare everything against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import DivergenceTerm, get_divergence
from .stats import TokenStats


def logits(hidden, weight, bias=None, softcap=None, temperature=1.0) -> Tensor:
    """`softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature` in float64: `[..., V]`."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    return scaled(z, softcap, temperature)


def scaled(z: Tensor, softcap: float | None, temperature: float) -> Tensor:
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
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
    """Divergence of each token from float64 logits `s`, `t` of shape `[..., V]`: `[...]`."""
    term = get_divergence(divergence, beta).term
    log_q, log_p = log_softmax_pair(s, t)
    entries = term(log_p, log_q, beta)[0]
    if entry_clip is not None:
        entries = torch.where(entries <= entry_clip, entries, entry_clip)
    tokens = entries.sum(-1)
    if token_clip is not None:
        tokens = torch.where(tokens <= token_clip, tokens, token_clip)
    return tokens


def log_softmax_pair(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of both; entries at -inf on both sides get a finite value whose exponential is exactly zero."""
    absent = torch.isneginf(s) & torch.isneginf(t)
    s, t = (z.masked_fill(absent, -1e4) for z in (s, t))
    return s.log_softmax(-1), t.log_softmax(-1)


def reduce(tokens: Tensor, mask=None, token_weight=None, reduction="mean", num_tokens=None) -> Tensor:
    """What the ops do with per-token values: masked tokens are exactly zero, the mean is over counted tokens."""
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
    """`atesd_kernels.linear_divergence`, dense and in float64. The teacher gets no gradient."""
    shared = teacher_weight is None
    teacher_weight = student_weight if shared else teacher_weight
    teacher_bias = student_bias if shared and teacher_bias is None else teacher_bias
    s = logits(student_hidden, student_weight, student_bias, softcap, temperature)
    with torch.no_grad():
        t = logits(teacher_hidden, teacher_weight, teacher_bias, softcap, teacher_temperature or temperature)
    return reduce(token_divergence(s, t, **divergence_options), mask, token_weight, reduction, num_tokens)


def linear_logprobs(hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None, mask=None) -> Tensor:
    """`atesd_kernels.linear_logprobs`, dense and in float64."""
    log_q = logits(hidden, weight, bias, softcap, temperature).log_softmax(-1)
    return reduce(log_q.gather(-1, targets.long().clamp_min(0).unsqueeze(-1)).squeeze(-1), mask, reduction="none")


def token_stats(s: Tensor, t: Tensor, targets=None, *, divergence="forward_kl", beta=0.5) -> TokenStats:
    """`TokenStats` of float64 logits `[..., V]`."""
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
