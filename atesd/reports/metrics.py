"""What a run writes down while it goes: metrics.jsonl, samples.jsonl, seconds by phase and peak memory.

Separate from the trainer so that its loop stays readable, and strict: every line is standard JSON, and a resumed run's
file is the file of a run that was never interrupted.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class RunLog:
    """Appends one JSON line a step to RUN_DIR/metrics.jsonl, and samples to RUN_DIR/samples.jsonl.

    Args:
        resume_step: None starts the files anew; a number keeps the lines up to and including that step and drops the
            rest, a half-written last line among them. 0 therefore keeps nothing of a run whose steps count from 1.

    Example:
        >>> log = RunLog(run_dir, resume_step=None)  # doctest: +SKIP
        >>> log.log(1, {"loss": 0.5, "alpha": 0.7})  # doctest: +SKIP
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            path = self.run_dir / name
            kept = [] if resume_step is None else [row for row in read_jsonl(path) if row["step"] <= resume_step]
            beside = path.with_suffix(".jsonl.tmp")
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(as_line(row) for row in kept)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        self.metrics_file = (self.run_dir / METRICS).open("a", encoding="utf-8")
        self.samples_file = (self.run_dir / SAMPLES).open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends `{"step": step, **metrics}`. A NaN or infinity becomes null, and is named in "nonfinite"."""
        self.metrics_file.write(as_line({"step": step, **metrics}))
        self.metrics_file.flush()

    def sample(self, step: int, sample: dict[str, Any]) -> None:
        """Appends one sample, e.g. problem id, prompt, response and alpha."""
        self.samples_file.write(as_line({"step": step, **sample}))
        self.samples_file.flush()

    def close(self) -> None:
        self.metrics_file.close()
        self.samples_file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def as_line(row: dict[str, Any]) -> str:
    """One line of standard JSON, which knows no NaN: {"loss": nan} -> {"loss": null, "nonfinite": {"loss": "nan"}}."""
    row = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    bad = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        row = {**row, **dict.fromkeys(bad), "nonfinite": bad}
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file. A last line cut off by a kill is left out."""
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n") and line.strip()]


class PhaseTimer:
    """Seconds spent in each named phase of a step, summed over its micro-batches.

    GPU work is asynchronous. Where a GPU is in use, a phase lasts from the moment the GPU reaches its start to the
    moment the GPU reaches its end. CUDA events mark both, and only `take` waits for them.

    Example:
        >>> timer = PhaseTimer()
        >>> with timer.phase("rollout"):
        ...     pass
        >>> sorted(timer.take())
        ['seconds_rollout']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_event, start = recorded_event(), time.perf_counter()
        try:
            yield
        finally:
            if start_event is None:
                self.add(name, time.perf_counter() - start)
            else:
                self.events.append((name, start_event, recorded_event()))

    def take(self) -> dict[str, float]:
        """{"seconds_<name>": seconds} since the last call; starts again from zero."""
        for name, start, end in self.events:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1000)
        taken = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds, self.events = {}, []
        return taken

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def recorded_event() -> torch.cuda.Event | None:
    """The time at which the GPU gets here; None where no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory_bytes() -> int:
    """Peak memory of this process: GPU memory allocated by torch where it is in use, resident memory otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
