"""Measures how hard each problem is for the student, for per-example exposure (beyond the paper, off by default)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Difficulty:
    """Computes one number per problem of a step: 0 for an average problem, positive for a hard one.

    `x` is the current student's mean -log p over the reference's tokens, with only the problem in the prompt.
    `z = (x - mean) / std`, with running mean and standard deviation over all problems so far, including this step's
    (our choice). The policy reads `tanh(z)`.

    It costs a forward pass of the student over the step's references, without gradient, so it is off by default.
    `ExposureController` defines how the problems of a window share a reward.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def normalise(self, values: Sequence[float]) -> list[float]:
        """Adds `values` to the running statistics and returns their z; 0 for a value that is not finite."""
        for x in filter(math.isfinite, values):
            self.count += 1
            delta = x - self.mean
            self.mean += delta / self.count
            self.squares += delta * (x - self.mean)
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return [(x - self.mean) / (std + 1e-8) if math.isfinite(x) and std > 0 else 0.0 for x in values]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
