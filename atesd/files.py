"""Atomic writes of small files: write a temporary file in the same folder, then rename it.

Settings, reports, evaluations and studies use them. Checkpoints must also survive a power cut; see `checkpoint.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically. Creates the parent folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # unique per process: writes may be concurrent
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
