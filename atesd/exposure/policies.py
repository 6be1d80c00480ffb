"""Every way of choosing the exposure alpha, behind one interface, and `make_policy`, which builds one by name.

| name              | alpha                                                                                     |
|-------------------|-------------------------------------------------------------------------------------------|
| `atesd`           | learned (`controller.py`)                                                                 |
| `one_step`        | learned from the next step only, L = 1: the paper's ablation                              |
| `full`            | 1: the teacher reads the whole solution, which is OPSD                                    |
| `fixed`           | `fixed_alpha`                                                                             |
| `random`          | uniform on [alpha_min, alpha_max], drawn anew for each hold window: the paper's ablation  |
| `linear`, `cosine`| from `start_alpha` to `end_alpha` (by default alpha_min to alpha_max: our choice) over the run |
| `module:object`   | your own: a callable that returns an `ExposurePolicy` (`atesd/config/doors.py`)           |
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from atesd.config import doors
from atesd.exposure.controller import ExposureController, require_same_policy


class ExposurePolicy(Protocol):
    """What a run asks of an exposure policy. Steps are optimizer steps from 0, in order.

    A step calls `alpha` (`alphas` where per_example_exposure is on), then `observe`. Only the main process calls them.

    Attributes:
        name: for messages; `load_state_dict` may compare it with the saved one.
        hold_window: steps for which an exposure is held. `use_exposure` in TRL reads it, where there is one.
    """

    name: str
    hold_window: int

    def alpha(self, step: int, *, deterministic: bool = False) -> float:
        """Exposure of step `step`, in [0, 1]. `deterministic`: the mean of what it may choose; it changes nothing."""

    def alphas(self, step: int, difficulty: Sequence[float]) -> list[float]:
        """One exposure for each problem of the step; all the same unless the policy is per-example."""

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
        """Take what step `step` measured and return its metrics: `{"alpha": ...}`, the mean exposure, and any others.

        Args:
            loss: training loss; None where the update was skipped.
            mismatch: mean divergence between teacher and student, without a clip.
            confidence: mean probability of the student's likeliest token.
            probe_nll: NLL of the held-out references in nats a token; None at steps between measurements.
            grounded: mean log-probability that the teacher gives to the tokens it was not shown.
        """

    def finish(self) -> dict[str, float]:
        """The run is over. Returns what summary.json keeps, {} for nothing."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class ScheduledExposure:
    """alpha as a function of the step alone: `full`, `fixed`, `linear`, `cosine`. The last window has `end_alpha`."""

    def __init__(
        self,
        name: str,
        start_alpha: float,
        end_alpha: float,
        ramp: Callable[[float], float] = float,
        *,
        max_steps: int = 1,
        hold_window: int = 1,
    ) -> None:
        if max_steps < 1 or hold_window < 1:
            raise ValueError(f"max_steps and hold_window must be at least 1, got {max_steps} and {hold_window}")
        for alpha in (start_alpha, end_alpha):
            if not 0 <= alpha <= 1:
                raise ValueError(f"exposure policy {name!r} needs exposures in [0, 1], got {alpha}")
        self.name, self.start_alpha, self.end_alpha, self.ramp = name, start_alpha, end_alpha, ramp
        self.max_steps, self.hold_window = max_steps, hold_window

    def alpha(self, step: int, *, deterministic: bool = False) -> float:
        last_window = (self.max_steps - 1) // self.hold_window
        w = self.ramp(min(1.0, step // self.hold_window / last_window)) if last_window else 0.0
        return (1 - w) * self.start_alpha + w * self.end_alpha

    def alphas(self, step: int, difficulty: Sequence[float]) -> list[float]:
        return [self.alpha(step)] * len(difficulty)

    def observe(self, step: int, **measured: float | None) -> dict[str, float]:
        return {"alpha": self.alpha(step)}

    def finish(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same_policy(state, self.name)


class RandomExposure(ScheduledExposure):
    """alpha ~ Uniform[alpha_min, alpha_max] for each hold window, from a generator of its own."""

    def __init__(self, *, alpha_min: float = 0.0, alpha_max: float = 1.0, hold_window: int = 2, seed: int = 0) -> None:
        super().__init__("random", alpha_min, alpha_max, hold_window=hold_window)
        self.generator = torch.Generator().manual_seed(seed)
        self.window_start: int | None = None
        self.held = 0.0

    def alpha(self, step: int, *, deterministic: bool = False) -> float:
        if deterministic:
            return (self.start_alpha + self.end_alpha) / 2
        if self.window_start is None or step >= self.window_start + self.hold_window:
            u = torch.rand((), dtype=torch.float64, generator=self.generator).item()
            self.window_start, self.held = step, self.start_alpha + u * (self.end_alpha - self.start_alpha)
        return self.held

    def state_dict(self) -> dict[str, Any]:
        generator = self.generator.get_state().clone()
        return {"name": self.name, "generator": generator, "window_start": self.window_start, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])
        self.window_start, self.held = state["window_start"], state["held"]


def scheduled(
    name: str,
    ramp: Callable[[float], float],
    *,
    max_steps: int,
    hold_window: int = 2,
    alpha_min: float = 0.0,
    alpha_max: float = 1.0,
    start_alpha: float | None = None,
    end_alpha: float | None = None,
) -> ScheduledExposure:
    start_alpha = alpha_min if start_alpha is None else start_alpha
    end_alpha = alpha_max if end_alpha is None else end_alpha
    return ScheduledExposure(name, start_alpha, end_alpha, ramp, max_steps=max_steps, hold_window=hold_window)


def half_cosine(w: float) -> float:
    """(1 - cos(pi w)) / 2."""
    return (1 - math.cos(math.pi * w)) / 2


def full() -> ScheduledExposure:
    return ScheduledExposure("full", 1.0, 1.0)


def fixed(*, fixed_alpha: float) -> ScheduledExposure:
    return ScheduledExposure("fixed", fixed_alpha, fixed_alpha)


BUILDERS: dict[str, Callable[..., ExposurePolicy]] = {
    "atesd": ExposureController,
    "one_step": partial(ExposureController, lookahead=1, name="one_step"),
    "full": full,
    "fixed": fixed,
    "random": RandomExposure,
    "linear": partial(scheduled, "linear", float),
    "cosine": partial(scheduled, "cosine", half_cosine),
}
POLICY_NAMES = tuple(BUILDERS)


def make_policy(name: str, **settings: Any) -> ExposurePolicy:
    """The exposure policy `name`: one of `POLICY_NAMES`, or `module:object` for your own.

    `settings` may include settings of other policies, as a config does; they are ignored (`one_step` ignores
    `lookahead`). A setting that no policy has raises TypeError.

    The object of `module:object` is called with those of `atesd.config.doors.POLICY_SETTINGS` that its signature names
    and with all other `settings`.

    Raises:
        ValueError: an unknown name, or a setting's value that the policy refuses.
        TypeError: a setting that no policy has.
        ConfigError: `module:object` cannot be imported, or does not take the settings, or makes no ExposurePolicy.

    >>> make_policy("fixed", fixed_alpha=0.25, hold_window=2, max_steps=10).alpha(0)
    0.25
    """
    if doors.is_object(name):
        own = {key: value for key, value in settings.items() if key not in doors.POLICY_SETTINGS}
        factory = doors.policy_factory(name, own)
        named = inspect.signature(factory).parameters
        policy = factory(**own, **{key: settings[key] for key in settings.keys() - own.keys() if key in named})
        doors.require_methods("exposure_policy", name, policy, doors.POLICY_METHODS)
        return policy
    if name not in BUILDERS:
        raise ValueError(f"unknown exposure policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
    taken = {policy: set(inspect.signature(builder).parameters) - {"name"} for policy, builder in BUILDERS.items()}
    known = set().union(*taken.values())
    if unknown := sorted(set(settings) - known):
        raise TypeError(
            f"make_policy got settings no exposure policy has: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    mine = taken[name] - ({"lookahead"} if name == "one_step" else set())
    return BUILDERS[name](**{key: value for key, value in settings.items() if key in mine})
