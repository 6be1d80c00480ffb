"""What a command prints: tables in a terminal, aligned columns in a file or pipe, one JSON document for scripts."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from atesd.terminal import printable, show

NUMBER = re.compile(r"[-+]?[\d,.]+( ?(%|GiB|s|points|tokens))?|-?")


@dataclass(frozen=True)
class Table:
    """A table. Without a header it is a list of names with what belongs to them."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only, and are aligned to the right."""
        if not self.rows:
            return [False] * len(self.header)
        return [all(NUMBER.fullmatch(cell) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Printout:
    """Texts and tables, and the same as JSON values.

    >>> print(Printout([Table("devices", [["cpu", "2 cores"], ["cuda:0", "none"]])], {}))
    devices
      cpu     2 cores
      cuda:0  none
    """

    parts: Sequence[str | Table]
    data: Any

    def __str__(self) -> str:
        return "\n\n".join(part if isinstance(part, str) else aligned(part) for part in self.parts)

    def show(self, as_json: bool = False) -> None:
        if as_json:
            show(json.dumps(finite(self.data), indent=1, allow_nan=False))
        elif sys.stdout.isatty():
            draw(self.parts)
        else:
            show(self)


def aligned(table: Table) -> str:
    rows = [row for row in (table.header, *table.rows) if row]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [table.title] if table.title else []
    for row in rows:
        cells = zip(row, widths, table.numeric, strict=True)
        lines.append("  " + "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells))
    return "\n".join(line.rstrip() for line in lines)


def draw(parts: Sequence[str | Table]) -> None:
    """Prints to a terminal of any width, by rich. Cells are text: what looks like rich's markup is shown as it is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False)
    for number, part in enumerate(parts):
        if number:
            console.print()
        if isinstance(part, str):
            console.print(Text(printable(part)), soft_wrap=True)
        else:
            grid = Grid(
                title=Text(part.title, "bold") if part.title else None,
                title_justify="left", show_header=bool(part.header), box=box.ROUNDED,
            )  # fmt: skip
            for name, right in zip(part.header or [""] * len(part.numeric), part.numeric, strict=True):
                grid.add_column(Text(name), justify="right" if right else "left", overflow="fold")
            for row in part.rows:
                grid.add_row(*(Text(printable(cell)) for cell in row))
            console.print(grid)


@contextmanager
def messages_to_stderr(as_json: bool) -> Iterator[None]:
    """Within, with `as_json`, what this process and those it starts print goes to stderr: stdout is the document's."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def finite(value: Any) -> Any:
    """Returns JSON values with null for numbers that are not finite: JSON has no others."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
