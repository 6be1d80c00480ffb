"""What the losses report about each token, from the sweeps they make anyway."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics, without gradient, each of the shape of the batch's leading dimensions; 0 where masked.

    Floating fields are fp32 (fp64 for fp64 inputs), entropies and log-probabilities in nats, all of the
    temperature-scaled distributions the loss compares.
    """

    divergence: Tensor
    """The divergence before any clip."""
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    """None where there is no teacher (`linear_logprobs`)."""
    student_logprob: Tensor | None
    """Log-probability of `targets` under the student; None if no targets were given."""
    teacher_logprob: Tensor | None
    student_top1_prob: Tensor
    """The student's largest probability: its confidence."""
    top1_agree: Tensor | None
    """bool: whether both models' most likely token is the same."""
