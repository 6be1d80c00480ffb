"""What a measurement is doing, as a line with the seconds since the start: they take minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

START = time.monotonic()


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


write: Callable[[str], None] = to_stderr  # pytest's conftest puts one here that passes by its capturing


def say(text: str) -> None:
    write(f"[{time.monotonic() - START:5.0f} s] {text}")
