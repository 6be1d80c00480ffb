"""Logs each step to metrics.jsonl, samples.jsonl, trackers and the progress bar. Only the main process writes; calls on
other processes are no-ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from atesd.reports.metrics import RunLog
from atesd.terminal import show, steps_bar

SHOWN = {"loss": "loss", "alpha": "alpha", "tokens_per_second": "tok/s"}


class StepLog:
    """Logs the steps of one run.

    Args:
        run_dir: the run's folder.
        accelerator: owns the trackers.
        start: the last finished step. Lines of later steps are dropped.
        tracker_steps: log to the trackers every this many steps.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator, start: int, tracker_steps: int):
        self.accelerator, self.start, self.tracker_steps = accelerator, start, tracker_steps
        # -1: what was measured before step 1 is measured again
        self.files = RunLog(run_dir, start or -1) if accelerator.is_main_process else None

    def steps(self, end: int) -> Iterator[int]:
        """Yields the remaining steps, with a progress bar."""
        self.bar = steps_bar(self.start, end, hidden=self.files is None)
        yield from self.bar

    def before_training(self, metrics: dict[str, Any]) -> None:
        """Logs metrics measured before step 1."""
        if self.files:
            self.files.log(0, metrics)
        self.accelerator.log(metrics, step=0)

    def step(self, step: int, metrics: dict[str, Any], sample: dict[str, Any]) -> None:
        """Logs one step. `step` is the number of updates so far."""
        if not self.files:
            return
        self.files.log(step, metrics)
        self.files.sample(step, sample)
        if step % self.tracker_steps == 0:
            self.accelerator.log(metrics, step=step)
        self.bar.set_postfix({short: f"{metrics[name]:.3g}" for name, short in SHOWN.items()})

    def sync(self) -> None:
        """Waits until the lines so far are on the device."""
        if self.files:
            self.files.sync()

    def note(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self.files:
            show(message)

    def close(self) -> None:
        if self.files:
            self.files.close()
