"""Measures the difference between an engine's log-probabilities and the trainer's, and the weight that corrects it.

Both are at temperature 1 and before top-k and top-p. Engine and trainer define this distribution in the same way, for
all sampling settings of the rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atesd.models.batching import to_device
from atesd.rollout.engine import Rollout
from atesd_kernels import linear_logprobs
from atesd_kernels.integrations.head import HeadSpec


class EngineMismatch:
    """Measures every micro-batch of a step, and optionally computes token weights.

    Args:
        clip: c of the token weight `min(exp(log p_trainer - log p_engine), c)` (truncated importance sampling); None
            for no weights.
        chunk_bytes: as in `atesd_kernels.linear_logprobs`.
    """

    def __init__(self, clip: float | None, chunk_bytes: int | None = None):
        self.clip, self.chunk_bytes = clip, chunk_bytes
        self.differences: list[Tensor] = []

    @torch.no_grad()
    def measure(self, rollouts: Sequence[Rollout], hidden: Tensor, head: HeadSpec, targets: Tensor) -> Tensor | None:
        """Returns token weights `(N,)`; None for all ones: without a clip, or without the engine's log-probabilities.

        Args:
            hidden: `(N, hidden)`, the student's hidden states of the response tokens of `rollouts`, concatenated.
            targets: `(N,)`, those tokens.
        """
        if any(r.logprobs is None for r in rollouts):
            return None
        engine = to_device(
            torch.tensor([logprob for r in rollouts for logprob in r.counted(r.logprobs)]), hidden.device
        )
        trainer = linear_logprobs(hidden, head.weight, targets, **head.logprob_options(), chunk_bytes=self.chunk_bytes)
        difference = trainer.float() - engine
        self.differences.append(difference)
        return None if self.clip is None else difference.exp().clamp(max=self.clip)

    def take(self, gather: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Returns the metrics of the step and resets; {} without the engine's log-probabilities.

        `gather` all-gathers the differences over processes.

        `engine_logprob_diff` is the mean over response tokens of `|log p_trainer - log p_engine|`. With a clip,
        `importance_weight` is the mean weight and `importance_clipped` the share of clipped tokens.
        """
        if not self.differences:
            return {}
        difference, self.differences = gather(torch.cat(self.differences)), []
        metrics = {"engine_logprob_diff": difference.abs().mean().item()}
        if self.clip is not None:
            ratio = difference.exp()
            metrics["importance_weight"] = ratio.clamp(max=self.clip).mean().item()
            metrics["importance_clipped"] = (ratio > self.clip).float().mean().item()
        return metrics
