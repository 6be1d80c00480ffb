"""The figure of the fixed-exposure study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from atesd.reports.plots import BLUE, GREEN, INK, ORANGE, STYLE

COLOURS = {"all": INK, "easy": GREEN, "middle": BLUE, "hard": ORANGE}
PANELS = {
    "outcome": "decrease of reference NLL, nats per token",
    "accuracy": "correct answers",
    "mismatch_p95": "mismatch tail (95th percentile), nats",
    "top1_disagreement": "top-1 disagreement",
}


@matplotlib.rc_context(STYLE)
def sweep_figure(summary: list[dict[str, Any]], path: Path) -> None:
    """Plots each panel against alpha, by difficulty, to `path`. Error bars are one standard deviation over seeds."""
    names = [name for name in PANELS if any(name in row for row in summary)]
    figure = Figure(figsize=(3.6 * len(names), 3.2), dpi=144, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for group, colour in COLOURS.items():
            rows = [row for row in summary if row["group"] == group and name in row]
            axes.errorbar(
                [row["alpha"] for row in rows],
                [row[name] for row in rows],
                yerr=[row[f"{name}_std"] for row in rows] if group == "all" else None,
                color=colour,
                lw=2 if group == "all" else 1,
                marker="o",
                ms=4,
                capsize=3,
                label=group,
            )
        axes.set_xlabel("exposure alpha")
        axes.set_title(PANELS[name], fontsize=9)
    axes.legend(title="problems")
    figure.savefig(path)
