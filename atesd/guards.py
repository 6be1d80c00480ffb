"""Guards of a run: collapse detection, early stopping, and saving the best adapter by probe NLL.

A guard only reads a step's metrics; it never changes a gradient. On-policy self-distillation is known to collapse after
one or two hundred steps. Responses shrink or repeat themselves, the student's entropy vanishes or explodes, or the clip
removes most of the divergence from the teacher. They go on after their answer, never end, or speak of the reference
that only the teacher reads. All thresholds here are our choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atesd.config import ATESDConfig
from atesd.exposure.signals import finite
from atesd.files import replaced_folder
from atesd.step_metrics import NGRAM
from atesd.terminal import show

START_STEPS = 5  # the mean over this many first steps is a metric's start
IN_A_ROW = 3  # a sign must last this many steps
# metric -> (low, high): below low or above high times its start is a sign of collapse
RELATIVE_BOUNDS = {"student_entropy": (0.1, 5.0), "response_length": (0.1, None)}
REPETITION_BOUND = 0.5
# metric -> rise above (fall below) its start that is a sign of collapse, for a share, which may start at 0. The loss
# cannot correct a divergence that is clipped.
RISES = {"clip_fraction": 0.5, "context_leakage": 0.25, "after_answer": 0.5}
FALLS = {"end_of_turn_rate": 0.5}
BEST = "best"


class Guards:
    """Monitors the steps of a run.

    Args:
        config: reads `early_stopping_patience`, `stop_on_collapse` and `save_best`.
        run_dir: folder for the best adapter.

    Attributes:
        stop_reason: why the run should end now; None to continue.
    """

    def __init__(self, config: ATESDConfig, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.best_probe_nll: float | None = None
        self.best_step = 0
        self.probes_without_best = 0
        self.start: dict[str, list[float]] = {name: [] for name in (*RELATIVE_BOUNDS, *RISES, *FALLS)}
        self.signs_in_a_row: dict[str, int] = {}
        self.stop_reason: str | None = None

    def before_update(self, updates: int, probe_nll: float | None) -> bool:
        """Records the probe NLL after `updates` optimizer steps, before the next one changes the weights.

        Returns whether to save these weights, as the best so far, with `write_best`.
        """
        probe_nll = finite(probe_nll)
        if probe_nll is None:
            return False
        if self.best_probe_nll is None or probe_nll < self.best_probe_nll:
            self.best_probe_nll, self.best_step, self.probes_without_best = probe_nll, updates, 0
            return self.config.save_best
        self.probes_without_best += 1
        patience = self.config.early_stopping_patience
        if patience is not None and self.probes_without_best >= patience:
            self.stop_reason = (
                f"the probe NLL has not fallen below {self.best_probe_nll:.4g} (step {self.best_step}) in "
                f"{self.probes_without_best} measurements (early_stopping_patience)"
            )
        return False

    def after_step(self, step: int, metrics: dict[str, Any]) -> str | None:
        """Checks a step's metrics for signs of collapse. Reports each sign once. Returns `stop_reason`."""
        for sign in self.signs(metrics):
            self.signs_in_a_row[sign] = self.signs_in_a_row.get(sign, 0) + 1
            if self.signs_in_a_row[sign] != IN_A_ROW:
                continue
            show(f"step {step}: the student may be collapsing: {sign}, {IN_A_ROW} steps in a row")
            if self.config.stop_on_collapse:
                self.stop_reason = f"collapse: {sign} (stop_on_collapse)"
        present = set(self.signs(metrics))
        self.signs_in_a_row = {sign: n for sign, n in self.signs_in_a_row.items() if sign in present}
        for name, values in self.start.items():
            value = finite(metrics.get(name))
            if value is not None and len(values) < START_STEPS:
                values.append(value)
        return self.stop_reason

    def signs(self, metrics: dict[str, Any]) -> list[str]:
        """Returns the signs of collapse in this step's metrics."""
        found = []
        for name, values in self.start.items():
            value = finite(metrics.get(name))
            if value is None or len(values) < START_STEPS:
                continue
            start = sum(values) / len(values)
            low, high = RELATIVE_BOUNDS.get(name, (None, None))
            rise, fall = RISES.get(name), FALLS.get(name)
            if low is not None and value < low * start:
                found.append(f"{name} is below {low:g} times its start")
            if high is not None and value > high * start:
                found.append(f"{name} is above {high:g} times its start")
            if rise is not None and value > start + rise:
                found.append(f"{name} is more than {rise:g} above its start")
            if fall is not None and value < start - fall:
                found.append(f"{name} is more than {fall:g} below its start")
        if (finite(metrics.get("repetition")) or 0.0) > REPETITION_BOUND:
            found.append(f"more than {REPETITION_BOUND:.0%} of the responses' {NGRAM}-grams repeat")
        return found

    def write_best(self, save: Callable[[Path], None]) -> None:
        """Writes RUN_DIR/best atomically: the adapter (or model) and best.json."""
        best = {"step": self.best_step, "probe_nll": self.best_probe_nll}
        with replaced_folder(self.run_dir / BEST) as folder:
            save(folder / ("adapter" if self.config.use_peft else "model"))
            (folder / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """Returns the fields of summary.json: the best probe NLL, its number of updates, and the reason to stop."""
        best = {} if self.best_probe_nll is None else {"best_probe_nll": self.best_probe_nll}
        return best | {"best_step": self.best_step, "stopped": self.stop_reason}

    def state_dict(self) -> dict[str, Any]:
        names = ("best_probe_nll", "best_step", "probes_without_best", "start", "signs_in_a_row", "stop_reason")
        return {name: getattr(self, name) for name in names} | {"rules": self.rules()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that a guard has ended stays so until its rules change."""
        state = dict(state)
        if state.pop("rules", None) != self.rules():
            state["stop_reason"], state["signs_in_a_row"] = None, {}
        for name, value in state.items():
            setattr(self, name, value)

    def rules(self) -> list[Any]:
        return [self.config.early_stopping_patience, self.config.stop_on_collapse]
