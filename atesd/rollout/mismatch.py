"""How far an engine's log-probabilities are from the trainer's, and the weight that makes up for it.

Separate because it is about two programs computing one distribution, not about a loss. Both sides are taken at
temperature 1 and before top-k and top-p: that distribution both define alike, whatever the rollouts were filtered with.
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
    """Measures every micro-batch of a step, and weighs its tokens on request.

    Args:
        clip: c of the token weight `min(exp(log p_trainer - log p_engine), c)` (truncated importance sampling); None
            leaves all tokens as they are.
        chunk_bytes: as in `atesd_kernels.linear_logprobs`.
    """

    def __init__(self, clip: float | None, chunk_bytes: int | None = None):
        self.clip, self.chunk_bytes = clip, chunk_bytes
        self.differences: list[Tensor] = []

    @torch.no_grad()
    def measure(self, rollouts: Sequence[Rollout], hidden: Tensor, head: HeadSpec, targets: Tensor) -> Tensor | None:
        """Token weights `(N,)`, or None for all ones: no clip, or an engine without log-probabilities.

        Args:
            hidden: `(N, hidden)`, the student's hidden states of the response tokens of `rollouts`, end to end.
            targets: `(N,)`, those tokens.
        """
        if any(r.logprobs is None for r in rollouts):
            return None
        engine = to_device(torch.tensor([logprob for r in rollouts for logprob in r.logprobs]), hidden.device)
        trainer = linear_logprobs(hidden, head.weight, targets, **head.logprob_options(), chunk_bytes=self.chunk_bytes)
        difference = trainer.float() - engine
        self.differences.append(difference)
        return None if self.clip is None else difference.exp().clamp(max=self.clip)

    def take(self, gather: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Metrics of the step so far, and start again. Nothing where the engine gave no log-probabilities.

        `gather` gives the differences of all processes for those of this one.

        `engine_logprob_diff` is the mean over response tokens of `|log p_trainer - log p_engine|`; with a clip,
        `importance_weight` is the mean weight and `importance_clipped` the share of tokens at the clip.
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
