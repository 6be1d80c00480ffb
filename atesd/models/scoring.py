"""Log-probabilities of response tokens, from hidden states and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atesd.models.batching import PackedBatch, hidden_rows
from atesd_kernels import TokenStats, linear_logprobs
from atesd_kernels.integrations.head import HeadSpec


def head_logprobs(
    hidden: Tensor, head: HeadSpec, targets: Tensor, temperature: float, chunk_bytes: int | None = None
) -> tuple[Tensor, TokenStats]:
    """Returns the log-probabilities of `targets`, `(N,)`, differentiable, and their statistics."""
    return linear_logprobs(
        hidden,
        head.weight,
        targets,
        **head.logprob_options(temperature),
        chunk_bytes=chunk_bytes,
        return_stats=True,
    )


@torch.no_grad()
def token_logprobs(
    backbone: Callable[..., Any], head: HeadSpec, batch: PackedBatch, chunk_bytes: int | None = None
) -> Tensor:
    """Returns the log-probability, at temperature 1, of each response token of `batch`, `(N,)`."""
    return head_logprobs(hidden_rows(backbone, batch), head, batch.targets, 1.0, chunk_bytes)[0]
