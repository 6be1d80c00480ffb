"""The learned exposure policy: a Beta distribution over alpha, trained by REINFORCE on delayed rewards.

`ExposureController` samples an alpha from `BetaPolicy`, holds it for H student updates, computes the decision's reward
once L further steps are known (`credit.py`), and updates the policy after B rewarded decisions. It computes a few
hundred float64 numbers on the CPU, which takes negligible time.

With several processes, give each the same seed and the same all-reduced numbers: all then have the same policy.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from atesd.exposure import credit
from atesd.exposure.beta_policy import BetaPolicy, reinforce_loss, sample_beta
from atesd.exposure.signals import SIGNAL_NAMES, TrainingSignals

__all__ = ["PROGRESS_SIGNALS", "BetaPolicy", "ExposureController", "require_same_policy"]

PROGRESS_SIGNALS = ("probe_nll", "distill_loss")


def require_same_policy(state: dict[str, Any], name: str) -> None:
    if state["name"] != name:
        raise ValueError(
            f"the checkpoint holds the exposure policy {state['name']!r}, this run asks for {name!r}: "
            "resume with the policy the run was started with"
        )


class ExposureController:
    """Chooses alpha and learns from what follows. One `alpha(step)` and one `observe(step, ...)` a step, steps from 0.

    Step t0 samples alpha ~ pi(.|s); it is held for steps t0 .. t0+H-1. When the signals of step t0+L are known, the
    decision earns `R = G_lp + lambda_gt G_gt`. With L > H several decisions are pending at a time. Once B are paid:

        A    = (R - mean) / (std + eps)
        loss = -(1/B) sum A log pi(alpha|s) + c_t max(0, Entropy - H_target)^2
        c_t  = entropy_coef * min(1, (t + 1) / max_steps)

    Entropy is the mean over the batch's states. The bound is one-sided: a policy more certain than H_target is left
    alone. c_t rises linearly (our choice): explore freely at first, commit towards the end. log pi is that of the
    unclipped sample (`reinforce_loss` says why). Decisions sampled before the latest policy update are used as they
    are, without importance weights (our choice).

    `finish()` ends a run of any length. A pending decision with 1 <= n < L known steps is rewarded for those n, scaled
    as in `credit.learning_progress`, and counted as truncated. One without known steps is dropped and counted. Two or
    more rewarded decisions then make a last update. A single one has no others to compare with: it is dropped and
    counted.

    Per-example exposure (off by default, beyond the paper): `alphas(step, difficulty)` samples an alpha for each
    problem at every step, the policy also reading tanh(difficulty). A window is still one decision with one reward.
    Its log pi is the mean over all problems sampled before t0+L, so all problems share the reward equally, and the
    policy separates them by difficulty only.

    The arguments are named as in the config; every default is our choice:
        max_steps             length of the run in optimizer steps; scales the `step` signal and c_t
        hold_window           H
        lookahead             L
        policy_batch_size     B; with 1 there is nothing to compare a decision with, and only the entropy bound acts
        reward_gamma          gamma, in [0, 1]
        lambda_gt             weight of G_gt, 0 where there are no grounded scores. G_gt differs by up to a nat between
                              exposures, G_lp by 1e-3 to 1e-2 in a few steps: at 0.01 both matter
        progress_signal       "probe_nll" or "distill_loss" (`credit.py` says how they differ)
        alpha_min, alpha_max  the clip of alpha
        policy_learning_rate  Adam's, on phi; 0.05 follows a clear reward faster, but on pure noise drifts to a corner
                              sooner
        entropy_target        H_target in nats: Beta(2, 2) has -0.125, a standard deviation of 0.15 about -0.5
        entropy_coef          what c_t reaches at max_steps
    """

    def __init__(
        self,
        *,
        max_steps: int,
        hold_window: int = 2,
        lookahead: int = 4,
        policy_batch_size: int = 4,
        reward_gamma: float = 0.9,
        lambda_gt: float = 0.01,
        progress_signal: str = "probe_nll",
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        policy_learning_rate: float = 0.02,
        policy_hidden_size: int = 32,
        entropy_target: float = -0.5,
        entropy_coef: float = 1.0,
        per_example: bool = False,
        seed: int = 0,
        name: str = "atesd",
    ) -> None:
        counts = (max_steps, hold_window, lookahead, policy_batch_size)
        for label, count in zip(("max_steps", "hold_window", "lookahead", "policy_batch_size"), counts, strict=True):
            if count < 1:
                raise ValueError(f"{label} must be at least 1, got {count}")
        if not 0 <= reward_gamma <= 1:
            raise ValueError(f"reward_gamma must be in [0, 1], got {reward_gamma}")
        if not 0 <= alpha_min <= alpha_max <= 1:
            raise ValueError(f"need 0 <= alpha_min <= alpha_max <= 1, got {alpha_min} and {alpha_max}")
        if progress_signal not in PROGRESS_SIGNALS:
            raise ValueError(f"progress_signal must be one of {PROGRESS_SIGNALS}, got {progress_signal!r}")
        self.name, self.max_steps, self.progress_signal = name, max_steps, progress_signal
        self.hold_window, self.L, self.B = hold_window, lookahead, policy_batch_size
        self.alpha_min, self.alpha_max = alpha_min, alpha_max
        self.entropy_target, self.entropy_coef, self.per_example = entropy_target, entropy_coef, per_example
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = BetaPolicy(len(SIGNAL_NAMES) + per_example, policy_hidden_size, self.generator)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=policy_learning_rate)
        self.signals = TrainingSignals()
        self.ledger = credit.Ledger(lookahead, reward_gamma, lambda_gt)
        self.paid: list[tuple[credit.Decision, float]] = []
        self.window_start: int | None = None
        # What observe() reports of the open window: alpha, beta_a, beta_b, policy_entropy
        self.held: dict[str, float] = {}

    def alpha(self, step: int, *, deterministic: bool = False) -> float:
        """The exposure of step `step`: sampled where a hold window begins, the held one inside it.

        `deterministic=True` (evaluation) gives the clipped mean a / (a + b) in the present state and changes nothing.
        """
        if deterministic:
            with torch.no_grad():
                return self._clip(self._distribution([0.0])[1].mean.item())
        if self._open_window(step):
            self._sample(step, [0.0])
        return self.held["alpha"]

    def alphas(self, step: int, difficulty: Sequence[float]) -> list[float]:
        """One exposure for each problem of step `step`; call it once a step, with all of the step's problems.

        `difficulty` is any number a problem, 0 for an average one (such as the student's log-prob of the reference
        less its mean). Without `per_example` every problem gets `alpha(step)`.
        """
        if not self.per_example:
            return [self.alpha(step)] * len(difficulty)
        self._open_window(step)
        return self._sample(step, difficulty)

    def _open_window(self, step: int) -> bool:
        if self.window_start is not None and step < self.window_start:
            raise ValueError(f"step {step} is before the open hold window, which began at {self.window_start}")
        if self.window_start is not None and step < self.window_start + self.hold_window:
            return False
        self.window_start = step
        self.ledger.pending.append(credit.Decision(step, [], []))
        return True

    def _distribution(self, difficulty: Sequence[float]) -> tuple[list[list[float]], torch.distributions.Beta]:
        s = self.signals.state(self.max_steps)
        states = [s + [math.tanh(d)] if self.per_example else s for d in difficulty]
        return states, self.policy.distribution(torch.tensor(states, dtype=torch.float64))

    @torch.no_grad()
    def _sample(self, step: int, difficulty: Sequence[float]) -> list[float]:
        states, pi = self._distribution(difficulty)
        a, b = pi.concentration1, pi.concentration0
        samples = sample_beta(a, b, self.generator).tolist()
        alphas = [self._clip(sample) for sample in samples]
        # Samples of step t0+L or later act on the student after the reward of t0 is known: they get no credit
        if step < self.window_start + self.L:
            self.ledger.pending[-1].states += states
            self.ledger.pending[-1].samples += samples
        self.held = {
            "alpha": math.fsum(alphas) / len(alphas),
            "beta_a": a.mean().item(),
            "beta_b": b.mean().item(),
            "policy_entropy": pi.entropy().mean().item(),
        }
        return alphas

    def _clip(self, alpha: float) -> float:
        return min(self.alpha_max, max(self.alpha_min, alpha))

    def observe(
        self,
        step: int,
        *,
        loss: float | None,
        mismatch: float | None = None,
        confidence: float | None = None,
        probe_nll: float | None = None,
        grounded: float | None = None,
    ) -> dict[str, float]:
        """Records what step `step` measured before its update, rewards and learns if due, and returns metrics.

        None (or a non-finite number) means "not measured at this step": a probe that is not due, a skipped step.
        `credit.Trace` says what is used instead.
        """
        if self.window_start is None or not self.window_start <= step < self.window_start + self.hold_window:
            raise ValueError(f"observe({step}) without alpha({step}): the hold window began at {self.window_start}")
        self.ledger.record(step, loss if self.progress_signal == "distill_loss" else probe_nll, grounded)
        self.signals.update(step, self.held["alpha"], loss, mismatch, confidence, probe_nll)
        self._warn_if_blind(step)
        paid, rewards = self.ledger.settle()
        metrics = self.held | rewards
        self.paid += paid
        while len(self.paid) >= self.B:
            batch, self.paid = self.paid[: self.B], self.paid[self.B :]
            metrics |= self._update(batch)
        return metrics

    def finish(self) -> dict[str, float]:
        """End of the run: settle what is pending, as the class docstring defines, and return what there is to log."""
        truncated, metrics = self.ledger.settle(final=True)
        self.paid += truncated
        dropped = len(self.ledger.pending)
        if len(self.paid) >= 2:
            metrics |= self._update(self.paid)
        else:
            dropped += len(self.paid)
        self.ledger.pending, self.paid, self.window_start, self.held = [], [], None, {}
        return metrics | {"decisions_truncated": len(truncated), "decisions_dropped": dropped}

    def _update(self, batch: list[tuple[credit.Decision, float]]) -> dict[str, float]:
        advantages = credit.advantages([r for _, r in batch])
        # log pi of a decision is the mean over its samples: one row for each, with its share 1 / (B * their number)
        rows = [
            (state, sample, A, 1 / (len(batch) * len(decision.samples)))
            for (decision, _), A in zip(batch, advantages, strict=True)
            for state, sample in zip(decision.states, decision.samples, strict=True)
        ]
        states, samples, A, share = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        c_t = self.entropy_coef * min(1.0, self.signals.steps_done / self.max_steps)
        loss = reinforce_loss(self.policy.distribution(states), samples, A, share, self.entropy_target, c_t)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"advantage": advantages[-1], "policy_loss": loss.item(), "entropy_coef": c_t}

    def _warn_if_blind(self, step: int) -> None:
        if not self.ledger.pending or step != self.ledger.pending[0].start + self.L:
            return
        for what in self.ledger.never_measured():
            name = "grounded" if what == "grounded" else self.progress_signal
            way_out = "set lambda_gt to 0" if what == "grounded" else "use the other progress_signal"
            warnings.warn(
                f"no {name} was observed up to step {step}: without it the exposure policy learns nothing; "
                f"measure it, or {way_out}",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs, at any point between two calls; a copy, safe to keep."""
        return copy.deepcopy(
            {
                "name": self.name,
                "policy": self.policy.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "signals": self.signals.state_dict(),
                "ledger": self.ledger.state_dict(),
                "paid": [(asdict(d), r) for d, r in self.paid],
                "window_start": self.window_start,
                "held": self.held,
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; raises ValueError where it is another policy's."""
        require_same_policy(state, self.name)
        state = copy.deepcopy(state)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.signals.load_state_dict(state["signals"])
        self.ledger.load_state_dict(state["ledger"])
        self.paid = [(credit.Decision(**d), r) for d, r in state["paid"]]
        self.window_start, self.held = state["window_start"], state["held"]
