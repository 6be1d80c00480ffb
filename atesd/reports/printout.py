"""What a command prints: tables in a terminal, aligned columns in a file or pipe, one JSON document for scripts.

A table that a terminal is too narrow for becomes a block of lines for each row: no word is broken.
"""

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
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for number, part in enumerate(parts):
        if number:
            console.print()
        if isinstance(part, str):
            console.print(Text(printable(part)), soft_wrap=True)
            continue
        rows = [[printable(cell) for cell in row] for row in part.rows]
        cells = Table(printable(part.title), rows, [*map(printable, part.header)])
        widths = column_widths(cells, console.width)
        if widths is None:
            console.print(*blocks(cells), sep="\n")
        else:
            console.print(grid(cells, widths))


def grid(table: Table, widths: Sequence[int]) -> Any:
    """Returns rich's table with a box, whose columns have these widths."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    drawn = Grid(
        title=Text(table.title, "bold") if table.title else None,
        title_justify="left", show_header=bool(table.header), box=box.ROUNDED,
    )  # fmt: skip
    names = table.header or [""] * len(table.numeric)
    for name, right, width in zip(names, table.numeric, widths, strict=True):
        drawn.add_column(Text(name), justify="right" if right else "left", width=width, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


def column_widths(table: Table, width: int) -> list[int] | None:
    """Returns widths of columns that break no word in a box of `width` characters; None if there are none."""
    from rich.cells import cell_len

    rows = [row for row in (table.header, *table.rows) if row]
    columns = list(zip(*rows, strict=True))
    room = width - 3 * len(columns) - 1  # beside the lines of the box, and a space on both sides of a cell
    least = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        _, widest = max((w, i) for i, w in enumerate(widths) if w > least[i])
        widths[widest] -= 1
    return widths


def blocks(table: Table) -> list[Any]:
    """Returns the lines of a table that is too wide for the terminal: "column: value" of each row, rows apart."""
    from rich.text import Text

    lines = [Text(table.title, "bold")] if table.title else []
    for number, row in enumerate(table.rows):
        if not table.header:  # names with what belongs to them
            lines.append(Text(": ".join([row[0], " ".join(row[1:])])))
            continue
        if number:
            lines.append(Text())
        named = zip(table.header, row, strict=True)
        lines += [Text(f"{name}: {cell}" if name else cell) for name, cell in named if cell]
    return lines


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
