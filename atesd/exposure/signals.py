"""The training state that the exposure policy reads: six bounded running statistics.

The policy has no other input. This file defines the formula and normalisation of each statistic. All use numbers that
the step computes anyway; none needs an extra forward pass.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SIGNAL_NAMES = ("step", "alpha", "loss", "mismatch", "probe_nll", "confidence")


def finite(value: float | None) -> float | None:
    """Returns `value` as a float, or None if it is missing, NaN or infinite (a skipped step measures nothing)."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


@dataclass
class TrainingSignals:
    """The state s of the policy (the six statistics are the paper's, normalisation and decay are our choice).

    `ema_x` is the exponential moving average of x. It starts at the first value `x_0`. Each step that measures x
    updates it by `ema_x <- decay * ema_x + (1 - decay) * x`.

        step        2 min(1, t / max_steps) - 1            t = optimizer steps done
        alpha       2 ema_alpha - 1                        the recent exposure
        loss        tanh((ema_loss - loss_0) / |loss_0|)   the distillation loss relative to its start
        mismatch    the same for the mean token divergence without clips: distance to the teacher
        probe_nll   the same for the student's NLL on the probe set: the student without a teacher
        confidence  2 c - 1                                c = mean top-1 probability of the student in the last batch

    If the loss includes a reward, `loss` is the mismatch, so the policy reads only the distillation. Each signal is in
    [-1, 1]. Three are relative to their start, because losses of different models and divergences differ by orders of
    magnitude, but the policy's inputs must be O(1). A signal without a measurement is 0, the middle of its range.
    Missing (None) and non-finite values do not change their signal.

    >>> signals = TrainingSignals()
    >>> signals.update(0, alpha=0.5, loss=0.2, mismatch=0.4, confidence=0.75, probe_nll=None)
    >>> signals.state(max_steps=2)
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    """

    decay: float = 0.9
    steps_done: int = 0
    first: dict[str, float] = field(default_factory=dict)
    ema: dict[str, float] = field(default_factory=dict)
    confidence: float | None = None

    def update(
        self,
        step: int,
        alpha: float,
        loss: float | None,
        mismatch: float | None,
        confidence: float | None,
        probe_nll: float | None,
    ) -> None:
        """Adds the measurements of step `step` (counted from 0); None for a value it did not measure."""
        self.steps_done = step + 1
        for name, value in (("alpha", alpha), ("loss", loss), ("mismatch", mismatch), ("probe_nll", probe_nll)):
            value = finite(value)
            if value is None:
                continue
            self.first.setdefault(name, value)
            # ema_x <- decay ema_x + (1 - decay) x, with ema_x = x_0 before
            self.ema[name] = self.decay * self.ema.get(name, value) + (1 - self.decay) * value
        confidence = finite(confidence)
        if confidence is not None:
            self.confidence = min(1.0, max(0.0, confidence))

    def relative(self, name: str) -> float:
        if name not in self.ema:
            return 0.0
        # tanh((ema_x - x_0) / |x_0|); the floor avoids a division by zero
        return math.tanh((self.ema[name] - self.first[name]) / max(abs(self.first[name]), 1e-8))

    def state(self, max_steps: int) -> list[float]:
        """Returns the six signals in the order of `SIGNAL_NAMES`, each in [-1, 1]."""
        return [
            2 * min(1.0, self.steps_done / max_steps) - 1,
            2 * self.ema.get("alpha", 0.5) - 1,
            self.relative("loss"),
            self.relative("mismatch"),
            self.relative("probe_nll"),
            0.0 if self.confidence is None else 2 * self.confidence - 1,
        ]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__init__(**{**state, "first": dict(state["first"]), "ema": dict(state["ema"])})
