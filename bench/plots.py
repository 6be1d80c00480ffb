"""Lines on logarithmic axes, and the stamp that says which result a picture was drawn from.

A picture's bytes depend on matplotlib's version, so they cannot be compared. Its stamp can: the digest of the result's
file, kept in the picture.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

STAMP = "Result"  # a text field of the PNG


class Line(NamedTuple):
    label: str
    colour_of: str  # lines of one entrant share a colour
    points: list[tuple[float, float]]
    dashed: bool = False


Panel = tuple[str, list[Line]]  # its title, its lines


def digest(result: Path) -> str:
    return hashlib.sha256(result.read_bytes()).hexdigest()[:16]


def stamp_of(picture: Path) -> str | None:
    """The digest a picture was drawn from; None where there is no picture, or no stamp in it."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(STAMP)


def log_log(panels: list[Panel], x: str | list[str], rows: list[str], path: Path, source: str) -> None:
    """`rows` names the quantity of each row of panels; panels come row by row, `x` once or for each column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = len(panels) // len(rows)
    names = [x] * columns if isinstance(x, str) else x
    size = (7, 4.2) if len(panels) == 1 else (3.2 * columns, 3 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    colours: dict[str, str] = {}
    for number, (axis, (title, lines)) in enumerate(zip(axes.flat, panels, strict=True)):
        for line in lines:
            colour = colours.setdefault(line.colour_of, f"C{len(colours)}")
            style = "--" if line.dashed else "-"
            axis.plot(*zip(*line.points, strict=True), style, color=colour, marker="o", ms=3, label=line.label)
        axis.set(xscale="log", yscale="log", title=title, xlabel=names[number % columns])
        axis.set_ylabel(rows[number // columns] if number % columns == 0 else "")
        axis.grid(alpha=0.3)
    handles = {handle.get_label(): handle for axis in axes.flat for handle in axis.get_lines()}
    figure.legend(handles=list(handles.values()), fontsize=7, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={STAMP: source})
    plt.close(figure)
