"""A run's metrics as a result, and the picture on the front page: the plots of its report on one page.

atesd train quickstart --output_dir RUN_DIR
python -m bench.quickstart RUN_DIR
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from bench import machine
from bench.plots import STAMP

GAP = 12  # pixels between plots


def accuracy_plot(rows: list[dict]) -> str | None:
    """The held-out accuracy before training and after the last step, as bars with their intervals."""
    from matplotlib import rc_context

    from atesd.reports import plots

    measured = [row for row in rows if "eval_average" in row]
    if len(measured) < 2:
        return None
    ends = [measured[-1], measured[0]]  # the first bar is the lowest
    with rc_context(plots.STYLE):
        figure, axes = plots.canvas(10.4, 1.5)
        values = [row["eval_average"] for row in ends]
        below = [row["eval_average"] - row["eval_average_low"] for row in ends]
        above = [row["eval_average_high"] - row["eval_average"] for row in ends]
        axes.barh([0, 1], values, xerr=[below, above], color=[plots.BLUE, plots.GREY], ecolor=plots.INK, capsize=3)
        axes.set_yticks([0, 1], [f"after step {ends[0]['step']}", "before training"])
        axes.set_xlim(0, 1)
        axes.set_xlabel("held-out accuracy")
        axes.xaxis.get_major_locator().set_params(integer=False)
        return plots.png(figure)


def plot(result: dict, path: Path, source: str) -> None:
    from PIL import Image, PngImagePlugin

    from atesd.reports import plots

    rows = result["rows"]
    accuracy = accuracy_plot(rows)
    grid = [[accuracy]] if accuracy else []
    grid += [
        [plots.exposure_plot(rows)],
        [
            plots.line_plot(rows, {"mismatch": "mismatch"}, "mismatch, nats per token"),
            plots.line_plot(rows, {"probe_nll": "probe NLL"}, "probe NLL, nats per token"),
        ],
    ]
    images = [[Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))) for p in line] for line in grid]
    width = max(sum(image.width for image in line) + GAP * (len(line) - 1) for line in images)
    height = sum(line[0].height for line in images) + GAP * (len(images) - 1)
    page, top = Image.new("RGB", (width, height), "white"), 0
    for line in images:
        left = 0
        for image in line:
            page.paste(image, (left, top))
            left += image.width + GAP
        top += line[0].height + GAP
    stamp = PngImagePlugin.PngInfo()
    stamp.add_text(STAMP, source)
    page.quantize(64).save(path, pnginfo=stamp, optimize=True)


if __name__ == "__main__":
    from atesd.reports.metrics import METRICS, read_jsonl

    machine.save("quickstart", {"rows": read_jsonl(Path(sys.argv[1]) / METRICS)})
