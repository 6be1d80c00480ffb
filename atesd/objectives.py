"""What the student is trained on, and what is measured with it: functions of hidden states, heads and token ids.

Separate from the trainer so that the loop does not know a loss by name. An objective gets the hidden states of the
response tokens and gives `(loss, TokenStats)`; every statistic the run logs or the exposure policy reads comes from
that one call, so nothing goes over the vocabulary twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from atesd.batching import PackedBatch, hidden_rows
from atesd.config import ATESDConfig
from atesd_kernels import TokenStats, linear_divergence, linear_logprobs
from atesd_kernels.integrations.head import HeadSpec


class Objective(Protocol):
    """A loss on the response tokens of one micro-batch, already divided by `num_tokens`, the tokens of the whole step.

    Summed over micro-batches (and processes) it equals the loss of one large batch, and so do its gradients.
    """

    needs_teacher: bool

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: HeadSpec,
        teacher_hidden: Tensor | None,
        teacher_head: HeadSpec | None,
        targets: Tensor,
        num_tokens: int,
        token_weight: Tensor | None = None,
    ) -> tuple[Tensor, TokenStats]: ...


@dataclass(frozen=True)
class Distillation:
    """Mean over response tokens of `D(teacher || student)`, the whole next-token distributions compared.

    Attributes:
        divergence, beta, entry_clip, token_clip, chunk_bytes: as in `atesd_kernels.linear_divergence`.
        scoring_temperature: of both distributions; no T^2 factor (OPSD).
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    scoring_temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None
    chunk_bytes: int | None = None
    needs_teacher = True

    @classmethod
    def from_config(cls, config: ATESDConfig) -> Distillation:
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def __call__(
        self,
        student_hidden: Tensor,  # (N, hidden)
        student_head: HeadSpec,
        teacher_hidden: Tensor,  # (N, hidden)
        teacher_head: HeadSpec | None,  # None: the student's
        targets: Tensor,  # (N,)
        num_tokens: int,
        token_weight: Tensor | None = None,
    ) -> tuple[Tensor, TokenStats]:
        return linear_divergence(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            None if teacher_head is None else teacher_head.weight,
            student_bias=student_head.bias,
            teacher_bias=None if teacher_head is None else teacher_head.bias,
            softcap=student_head.softcap,
            divergence=self.divergence,
            beta=self.beta,
            temperature=student_head.temperature(self.scoring_temperature),
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            chunk_bytes=self.chunk_bytes,
            targets=targets,
            token_weight=token_weight,
            num_tokens=num_tokens,
            return_stats=True,
        )


@torch.no_grad()
def token_logprobs(backbone: Callable[..., Any], head: HeadSpec, batch: PackedBatch, **options: Any) -> Tensor:
    """`(N,)`: log-probability, at temperature 1, of each response token of `batch`."""
    return linear_logprobs(
        hidden_rows(backbone, batch),
        head.weight,
        batch.targets,
        temperature=head.temperature(1.0),
        bias=head.bias,
        softcap=head.softcap,
        **options,
    )


class TokenTotals:
    """Sums of `TokenStats` over the micro-batches of a step, kept on the device until `means` is asked for."""

    NAMES = ("mismatch", "top1_agreement", "student_entropy", "teacher_entropy", "student_confidence")

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.divergences: list[Tensor] = []

    def add(self, stats: TokenStats) -> None:
        columns = (
            stats.divergence,
            stats.top1_agree,
            stats.student_entropy,
            stats.teacher_entropy,
            stats.student_top1_prob,
        )
        self.sums.append(torch.stack([column.double().sum() for column in columns]))
        self.divergences.append(stats.divergence)

    def sum(self) -> Tensor:
        """`(5,)` float64, in the order of `NAMES`."""
        return torch.stack(self.sums).sum(0)

    def p95(self) -> float:
        """95th percentile of the token divergences (no clip applied)."""
        values = torch.cat(self.divergences).float().sort().values
        return float(values[int(0.95 * (len(values) - 1))])
