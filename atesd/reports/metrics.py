"""Logging of a run: metrics.jsonl, samples.jsonl, seconds by phase and peak memory.

Every line is standard JSON. A resumed run's files equal those of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atesd.errors import AtesdError
from atesd.files import write_atomically

if TYPE_CHECKING:
    import torch

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class RunFolderGone(AtesdError, OSError):
    """The run's folder was removed or renamed while the run was under way."""


def folder_gone(path: Path, run_dir: Path) -> RunFolderGone:
    either = "" if path == run_dir else f", or {run_dir}"
    return RunFolderGone(
        f"{path} is no longer where the run writes it: somebody removed or renamed it{either}. Nothing more can be "
        "saved there; put it back and go on with --resume, or start again"
    )


class RunLog:
    """Appends one JSON line per step to RUN_DIR/metrics.jsonl, and samples to RUN_DIR/samples.jsonl.

    Args:
        resume_step: None empties the files. A number keeps the lines up to and including that step and drops the
            rest, including an incomplete last line. 0 drops all lines of steps from 1 on. Lines that are not a run's
            are moved to metrics.jsonl.damaged (or samples.jsonl.damaged), with a warning.

    Example:
        >>> log = RunLog(run_dir, resume_step=None)  # doctest: +SKIP
        >>> log.log(1, {"loss": 0.5, "alpha": 0.7})  # doctest: +SKIP
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for name in (METRICS, SAMPLES):
            path = self.run_dir / name
            kept = []
            if resume_step is not None:
                rows, damaged = read_steps(path)
                move_aside(path, damaged)
                kept = [row for row in rows if row["step"] <= resume_step]
            write_atomically(path, "".join(as_line(row) for row in kept))
            self.files[name] = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends `{"step": step, **metrics}`. A NaN or infinity becomes null and is listed in "nonfinite"."""
        self.append(METRICS, {"step": step, **metrics})

    def sample(self, step: int, sample: dict[str, Any]) -> None:
        """Appends one sample, e.g. problem id, prompt, response and alpha."""
        self.append(SAMPLES, {"step": step, **sample})

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Appends a line.

        Raises:
            RunFolderGone: the file is no longer at its path, so the line would be lost.
        """
        file, path = self.files[name], self.run_dir / name
        try:
            there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            there = False
        if not there:
            raise folder_gone(path, self.run_dir)
        file.write(as_line(row))
        file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the device: a checkpoint must not be newer than the log."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def as_line(row: dict[str, Any]) -> str:
    """One line of standard JSON, which has no NaN: {"loss": nan} -> {"loss": null, "nonfinite": {"loss": "nan"}}."""
    row = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    bad = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        row = {**row, **dict.fromkeys(bad), "nonfinite": bad}
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file; [] if it does not exist. Skips an incomplete last line, left by a kill."""
    return [json.loads(line) for line in whole_lines(path)]


def whole_lines(path: str | os.PathLike[str]) -> list[bytes]:
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [line for line in lines[:-1] if line.strip()]


def read_steps(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Returns the rows of a run's log, which have a step each, and the lines that are no such rows."""
    rows, damaged = [], []
    for line in whole_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        good = isinstance(row, dict) and type(row.get("step")) is int
        good = good and (path.name != METRICS or all(is_metric(*field) for field in row.items()))
        rows.append(row) if good else damaged.append(line)
    return rows, damaged


def is_metric(name: str, value: Any) -> bool:
    return name == "nonfinite" or value is None or isinstance(value, int | float)


def move_aside(path: Path, lines: list[bytes]) -> None:
    """Appends `lines` to PATH.damaged, with a warning if there are any."""
    if lines:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in lines)
        warnings.warn(
            f"{path} has {len(lines)} damaged lines, e.g. {lines[0][:60]!r}: they are now in {aside}", stacklevel=3
        )


class PhaseTimer:
    """Seconds spent in each named phase of a step, summed over its micro-batches.

    GPU work is asynchronous, so on a GPU, CUDA events mark the start and end of a phase. Only `take` synchronises with
    the GPU.

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
        """Returns {"seconds_<name>": seconds} since the last call, and resets the timer."""
        for name, start, end in self.events:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1000)
        taken = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds, self.events = {}, []
        return taken

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def recorded_event() -> torch.cuda.Event | None:
    """Records a CUDA event and returns it; None if no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory_bytes() -> int:
    """Returns this process's peak memory: that allocated by torch on a GPU in use, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
