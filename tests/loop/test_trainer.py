"""The whole loop on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from atesd.trainer import train


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(tiny_config):
    run_dir = train(tiny_config())
    rows = metrics_of(run_dir)
    print(json.dumps(rows, indent=1))
    assert [row["step"] for row in rows] == [1, 2, 3]
