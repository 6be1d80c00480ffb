"""What a stage is given: its seconds, the sizes to measure at, and a place that keeps each result at once.

A stage is a module with `run(stage: Stage) -> None`. It runs in a process of its own, which is killed at its time
limit: whatever it kept before that stays.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atesd.files import write_json
from bench import machine

RESULT = "gpu.json"
DRY_NOTE = "A dry run, at toy sizes on a CPU: it shows that the stages run, and measures nothing."


@dataclass
class Stage:
    """One stage's run.

    Attributes:
        name: the key of its results in `gpu.json`.
        out: the folder of `gpu.json`.
        seconds: what it may take in all, its imports included.
        dry: toy sizes, on a machine without a GPU: shows that the code runs, measures nothing.
    """

    name: str
    out: Path
    seconds: float
    dry: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds before the time limit."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def keep(self, **results: Any) -> None:
        """Put `results` beside what this stage has kept so far, with the commit, and on the disk."""
        whole = read(self.out) | ({"dry": True} if self.dry else {})
        kept = whole.setdefault("stages", {}).setdefault(self.name, {"commit": machine.commit()})
        kept.update(results)
        write_json(self.out / RESULT, whole)

    def begin(self) -> None:
        """Drop what an earlier run has left of this stage in the same folder.

        Raises:
            RuntimeError: the folder holds a dry run's results and this run is real, or the other way round.
        """
        whole = read(self.out)
        if whole and whole.get("dry", False) != self.dry:
            kinds = ("a real run", "a dry run")
            raise RuntimeError(
                f"{self.out / RESULT} holds results of {kinds[not self.dry]}, and this is {kinds[self.dry]}: "
                "give another --out"
            )
        whole.get("stages", {}).pop(self.name, None)
        left_out = whole.get("left_out", {})
        whole["left_out"] = {
            what: why for what, why in left_out.items() if what.split(":")[0].split(" (")[0] != self.name
        }
        write_json(self.out / RESULT, whole | ({"dry": True} if self.dry else {}))

    def leave_out(self, what: str, why: str) -> None:
        """Name what was not measured. It is listed in the last table."""
        leave_out(self.out, f"{self.name}: {what}", why)

    def say(self, text: str) -> None:
        print(f"[{self.name} {time.monotonic() - self.started:5.1f} s] {text}", flush=True)


def leave_out(out: Path, what: str, why: str) -> None:
    whole = read(out)
    whole.setdefault("left_out", {})[what] = why
    write_json(out / RESULT, whole)


def read(out: Path) -> dict[str, Any]:
    """All results so far; empty before the first."""
    path = out / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
