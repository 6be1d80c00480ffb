"""Delayed credit: what an exposure decision earned, from the steps that followed it.

Pure functions on plain numbers, apart from the controller so that they can be checked by hand; `Trace`, which answers
"what was this signal at step t" where it was not measured at every step; and `Ledger`, which pays each decision when
its steps are known.

A decision made at step t0 is paid for the L steps after it. l_t and g_t are the progress signal and the grounded score
that step t measured *before* its own weight update, so that l_{t0} - l_{t0+1} is the work of the update made at t0.

Two readings of l exist because the distillation loss at step t depends on alpha_t itself (a teacher that reads less is
closer to the student, whatever the student learned):

- `distill_loss`, the paper's reading. Within one hold window alpha is constant and a fall of l is learning. Where the L
  steps cross into the next window, a smaller next alpha also makes l fall, and the decision before it is paid for that.
- `probe_nll`, the student's NLL of reference solutions on a fixed held-out set. No exposure enters it, so only a better
  student lowers it.

In both, max(0, .) lets noise pay too: a noisier signal has a larger positive part. It pays every decision alike only
if the noise does not depend on alpha, which holds better for the probe (the same problems each time).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from atesd.exposure.signals import finite


def discount_mass(n: int, gamma: float) -> float:
    """sum_{i=1..n} gamma^(i-1)."""
    return sum(gamma ** (i - 1) for i in range(1, n + 1))


def learning_progress(losses: Sequence[float], gamma: float, lookahead: int | None = None) -> float:
    """G_lp of a decision whose progress signal went `losses` = l_{t0}, ..., l_{t0+n} (n >= 1).

    `lookahead` is L; where the run ended after n < L steps, the sum is scaled to the discount mass of L steps
    (our choice), so that being cut off is not itself a punishment.
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
    """G_gt of a decision whose grounded scores were `scores` = g_{t0+1}, ..., g_{t0+n} (n >= 1)."""
    if not scores:
        raise ValueError("grounded_score needs at least one score, got none")
    # G_gt = sum_i gamma^(i-1) g_{t0+i} / sum_i gamma^(i-1)
    return sum(gamma**i * g for i, g in enumerate(scores)) / discount_mass(len(scores), gamma)


def reward(progress: float, grounded: float, lambda_gt: float) -> float:
    """R = G_lp + lambda_gt G_gt."""
    return progress + lambda_gt * grounded


def advantages(rewards: Sequence[float], eps: float = 1e-8) -> list[float]:
    """A = (R - mean) / (std + eps) over the B decisions of one update.

    `std` is that of the B values themselves (divided by B) and eps = 1e-8: our choice. Equal rewards, and a batch of
    one, give zero: there is nothing to prefer.
    """
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (std + eps) for r in rewards]


class Trace:
    """One signal by step, linear between its measurements.

    A signal may be measured only every k steps (the probe), and a skipped step measures nothing. Between two
    measurements the signal is taken as linear (our choice): whatever the phase of a decision against the
    measurements, it is paid its share of the change around it, and none looks bad because no measurement fell into
    its window. Until the next measurement is in, the steps after the last one are unknown and the decisions that need
    them wait. Before the first measurement the signal is taken to be equal to it.
    """

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    @property
    def known_until(self) -> int | None:
        """The last measured step; None before the first."""
        return max(self.values, default=None)

    def record(self, step: int, value: float | None) -> None:
        """Take the measurement of `step`; None and non-finite values are no measurement."""
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
        """The signal at steps start..stop, both included; `stop` must be known."""
        earliest = self.values[min(self.values)]
        return [self.values.get(t, earliest) if t < stop else self.values[t] for t in range(start, stop + 1)]

    def forget_before(self, step: int) -> None:
        """Drop what no pending decision can ask for; the last measurement stays, the next line starts from it."""
        last = self.known_until
        self.values = {t: v for t, v in self.values.items() if t >= step or t == last}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.values), "values": list(self.values.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(zip(state["steps"], state["values"], strict=True))


@dataclass
class Decision:
    """One hold window: its first step t0, and what was sampled for it.

    `states` and `samples` have one entry, or one for each problem with per-example exposure. Samples are not clipped.
    """

    start: int
    states: list[list[float]]
    samples: list[float]


class Ledger:
    """The pending decisions, and the two traces that pay them. With `lambda_gt` = 0 no grounded score is waited for."""

    def __init__(self, lookahead: int, gamma: float, lambda_gt: float) -> None:
        self.L, self.gamma, self.lambda_gt = lookahead, gamma, lambda_gt
        self.progress, self.grounding = Trace(), Trace()
        self.pending: list[Decision] = []

    @property
    def known_until(self) -> int:
        """The last step at which every needed signal is known; -1 before."""
        traces = [self.progress] + ([self.grounding] if self.lambda_gt else [])
        return min(-1 if trace.known_until is None else trace.known_until for trace in traces)

    def record(self, step: int, progress: float | None, grounded: float | None) -> None:
        self.progress.record(step, progress)
        self.grounding.record(step, grounded)

    def settle(self, final: bool = False) -> tuple[list[tuple[Decision, float]], dict[str, float]]:
        """Take out the decisions that can be paid now: (decision, reward) in order, and their mean rewards to log.

        A decision is due when step t0+L is known; at the end of the run (`final`), when step t0+1 is. The others stay.
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
