"""Per-token statistics of the losses. They come from the loss's own sweeps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics, without gradient. Each has the batch's leading dimensions; 0 where masked.

    Floating fields are fp32 (fp64 for fp64 inputs). Entropies and log-probabilities are in nats. All refer to the
    temperature-scaled distributions that the loss compares.
    """

    divergence: Tensor
    """The divergence before any clip."""
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    """None without a teacher (`linear_logprobs`)."""
    student_logprob: Tensor | None
    """Log-probability of `targets` under the student; None without targets."""
    teacher_logprob: Tensor | None
    student_top1_prob: Tensor
    """The student's confidence: its largest probability."""
    top1_agree: Tensor | None
    """bool: whether both models have the same most likely token."""
