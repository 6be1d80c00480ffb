"""How hard each problem is for the student, for per-example exposure (beyond the paper, off by default).

Separate from the exposure policy, which only reads numbers, and from the trainer, which only passes them on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Difficulty:
    """One number for each problem of a step: 0 for an average one, positive for a hard one.

    `x` is the mean over the reference's tokens of the student's own -log p, the problem alone in its prompt, with the
    student as it stands. `z = (x - mean) / std`, with running mean and standard deviation over all problems seen so
    far, the step's own included (our choice). The policy reads `tanh(z)`.

    It costs a forward of the student over the step's references, without gradient: that is why it is off by default.
    How a reward is shared among the problems of a window is defined in `ExposureController`.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def normalise(self, values: Sequence[float]) -> list[float]:
        """Take in `values` and return their z; a value that is not finite has 0."""
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
