"""What a run has logged, and the settings that go on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atesd.config import ATESDConfig, load_config

OF_THE_MACHINE = ("seconds_", "tokens_per_second", "peak_memory_bytes")  # what depends on the machine's mood


def rows_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def steady_rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics, without those that depend on the machine."""
    rows = rows_of(run_dir)
    return [{name: v for name, v in row.items() if not name.startswith(OF_THE_MACHINE)} for row in rows]


def resume(run_dir: Path, *flags: str) -> ATESDConfig:
    return load_config(None, ["--resume", str(run_dir), *flags])
