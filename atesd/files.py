"""Small files that are whole or absent: written beside their place, then renamed into it.

Separate because settings, reports, evaluations and studies all promise it. Checkpoints, which must also survive a power
cut, have their own (`checkpoint.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # processes of one run may write at the same time
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
