"""Delayed credit: computes the reward of an exposure decision from the steps that follow it.

Pure functions on plain numbers define the rewards. `Trace` interpolates a signal that is not measured at every step.
`Ledger` computes the reward of each decision once its steps are known.

The reward of a decision at step t0 covers the L steps after it. l_t and g_t are the progress signal and the grounded
score, which step t measures *before* its own weight update. So l_{t0} - l_{t0+1} is the effect of the update at t0.

There are two choices of l, because the distillation loss at step t depends on alpha_t itself: a teacher that reads less
is closer to the student, even if the student has learned nothing.

- `distill_loss`, the paper's choice. Within one hold window alpha is constant, so a fall of l is learning. If the L
  steps cross into the next window, a smaller next alpha also lowers l, which rewards the decision before it.
- `probe_nll`, the student's NLL of reference solutions on a fixed held-out set. It does not depend on exposure, so only
  a better student lowers it.

In both, max(0, .) also rewards noise: a noisier signal has a larger positive part. This is the same for all decisions
only if the noise does not depend on alpha, which holds better for the probe (the same problems each time).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from atesd.exposure.signals import finite


def discount_mass(n: int, gamma: float) -> float:
    """Returns sum_{i=1..n} gamma^(i-1)."""
    return sum(gamma ** (i - 1) for i in range(1, n + 1))


def learning_progress(losses: Sequence[float], gamma: float, lookahead: int | None = None) -> float:
    """Returns G_lp of a decision with the progress signal `losses` = l_{t0}, ..., l_{t0+n} (n >= 1).

    `lookahead` is L. If the run ended after n < L steps, the sum is scaled to the discount mass of L steps (our
    choice), so that the early end does not lower the reward.
    """
    n = len(losses) - 1
    if n < 1:
        raise ValueError(
            f"learning_progress needs the signal at t0 and at least one later step, got {len(losses)} values"
        )
    # G_lp = sum_{i=1..L} gamma^(i-1) max(0, l_{t0+i-1} - l_{t0+i})
    total = sum(gamma ** (i - 1) * max(0.0, losses[i - 1] - losses[i]) for i in range(1, n + 1))
    if lookahead is None or lookahead == n:
        return total
    return total * discount_mass(lookahead, gamma) / discount_mass(n, gamma)


def grounded_score(scores: Sequence[float], gamma: float) -> float:
    """Returns G_gt of a decision with the grounded scores `scores` = g_{t0+1}, ..., g_{t0+n} (n >= 1)."""
    if not scores:
        raise ValueError("grounded_score needs at least one score, got none")
    # G_gt = sum_i gamma^(i-1) g_{t0+i} / sum_i gamma^(i-1)
    return sum(gamma**i * g for i, g in enumerate(scores)) / discount_mass(len(scores), gamma)


def reward(progress: float, grounded: float, lambda_gt: float) -> float:
    """Returns R = G_lp + lambda_gt G_gt."""
    return progress + lambda_gt * grounded


def advantages(rewards: Sequence[float], eps: float = 1e-8) -> list[float]:
    """Returns A = (R - mean) / (std + eps) over the B decisions of one update.

    `std` is the population standard deviation (divided by B), and eps = 1e-8: our choice. Equal rewards, or a batch of
    one, give zero.
    """
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (std + eps) for r in rewards]


class Trace:
    """One signal by step, interpolated linearly between its measurements.

    A signal may be measured only every k steps (the probe), and a skipped step measures nothing. We interpolate
    linearly between two measurements (our choice). So every decision gets its share of the change around it, even if
    no measurement falls into its window. Steps after the last measurement are unknown, and decisions that need them
    wait for the next one. Before the first measurement the signal equals the first measurement.
    """

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    @property
    def known_until(self) -> int | None:
        """The last measured step; None if there is none."""
        return max(self.values, default=None)

    def record(self, step: int, value: float | None) -> None:
        """Adds the measurement of `step`. Ignores None and non-finite values."""
        value = finite(value)
        if value is None:
            return
        last = self.known_until
        if last is not None:
            if step <= last:
                raise ValueError(f"step {step} was measured after step {last}: observe the steps in order, each once")
            for t in range(last + 1, step):
                w = (t - last) / (step - last)
                self.values[t] = (1 - w) * self.values[last] + w * value
        self.values[step] = value

    def window(self, start: int, stop: int) -> list[float]:
        """Returns the signal at steps start..stop, both included. `stop` must be known."""
        earliest = self.values[min(self.values)]
        return [self.values.get(t, earliest) if t < stop else self.values[t] for t in range(start, stop + 1)]

    def forget_before(self, step: int) -> None:
        """Drops steps before `step`, which no pending decision needs. Keeps the last measurement for interpolation."""
        last = self.known_until
        self.values = {t: v for t, v in self.values.items() if t >= step or t == last}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.values), "values": list(self.values.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(zip(state["steps"], state["values"], strict=True))


@dataclass
class Decision:
    """One hold window: its first step t0, and the states and samples at that step.

    `states` and `samples` have one entry, or with per-example exposure one per problem. Samples are not clipped.
    """

    start: int
    states: list[list[float]]
    samples: list[float]


class Ledger:
    """The pending decisions, and the two traces that reward them. `lambda_gt` = 0 does not wait for grounded scores."""

    def __init__(self, lookahead: int, gamma: float, lambda_gt: float) -> None:
        self.L, self.gamma, self.lambda_gt = lookahead, gamma, lambda_gt
        self.progress, self.grounding = Trace(), Trace()
        self.pending: list[Decision] = []

    @property
    def known_until(self) -> int:
        """The last step at which every needed signal is known; -1 if there is none."""
        traces = [self.progress] + ([self.grounding] if self.lambda_gt else [])
        return min(-1 if trace.known_until is None else trace.known_until for trace in traces)

    def record(self, step: int, progress: float | None, grounded: float | None) -> None:
        self.progress.record(step, progress)
        self.grounding.record(step, grounded)

    def settle(self, final: bool = False) -> tuple[list[tuple[Decision, float]], dict[str, float]]:
        """Removes the decisions that are due. Returns (decision, reward) pairs in order, and mean rewards to log.

        A decision is due when step t0+L is known; at the end of the run (`final`), when step t0+1 is known.
        """
        known = self.known_until
        wait = 1 if final else self.L
        due = [d for d in self.pending if d.start + wait <= known]
        self.pending = [d for d in self.pending if d.start + wait > known]
        if not due:
            return [], {}
        lp, gt, rewards = [], [], []
        for t0 in (d.start for d in due):
            stop = min(t0 + self.L, known)
            lp.append(learning_progress(self.progress.window(t0, stop), self.gamma, self.L))
            gt.append(grounded_score(self.grounding.window(t0 + 1, stop), self.gamma) if self.lambda_gt else 0.0)
            rewards.append(reward(lp[-1], gt[-1], self.lambda_gt))
        oldest = min((d.start for d in self.pending), default=known)
        self.progress.forget_before(oldest)
        self.grounding.forget_before(oldest)
        means = {"reward": rewards, "reward_progress": lp, "reward_grounded": gt}
        return list(zip(due, rewards, strict=True)), {name: math.fsum(v) / len(v) for name, v in means.items()}

    def never_measured(self) -> list[str]:
        needed = {"progress": self.progress} | ({"grounded": self.grounding} if self.lambda_gt else {})
        return [name for name, trace in needed.items() if trace.known_until is None]

    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": self.progress.state_dict(),
            "grounding": self.grounding.state_dict(),
            "pending": [asdict(d) for d in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress.load_state_dict(state["progress"])
        self.grounding.load_state_dict(state["grounding"])
        self.pending = [Decision(**d) for d in state["pending"]]
