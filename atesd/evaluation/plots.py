"""Plots of evaluations: accuracy by problem, and the paired difference of two runs.

reports/plots.py has the plots over the steps of a training run.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from atesd.reports.plots import BLUE, GREY, INK, ORANGE, STYLE, canvas, png


@matplotlib.rc_context(STYLE)
def problems_plot(values: Mapping[str, float]) -> str:
    """Returns a bar plot as a data URI, one bar per problem, best first."""
    figure, axes = canvas(10.4, 2.6)
    ordered = sorted(values.values(), reverse=True)
    axes.bar(np.arange(1, len(ordered) + 1), ordered, width=0.9, color=BLUE)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("problem")
    axes.set_ylabel("share of correct samples")
    return png(figure)


@matplotlib.rc_context(STYLE)
def difference_plot(
    estimates: Mapping[str, dict[str, float | None]], differences: Mapping[str, float], names: str
) -> str:
    """Returns two plots as a data URI: differences of the rates with intervals, and of the average by problem.

    Args:
        estimates: {metric: {value, low, high}}, differences of rates between 0 and 1.
        differences: {problem: difference of the average}.
        names: label of the difference, e.g. "B - A".
    """
    figure = Figure(figsize=(10.4, 3.3), dpi=144, layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, metric in enumerate(reversed(estimates.values())):
        value = 100 * metric["value"]
        if metric["low"] is not None:
            low, high = 100 * metric["low"], 100 * metric["high"]
            left.plot([low, high], [row, row], color=GREY if low <= 0 <= high else BLUE, lw=3, solid_capstyle="butt")
        left.plot([value], [row], "o", color=INK, ms=5)
    left.set_yticks(range(len(estimates)), list(reversed(estimates)))
    left.margins(y=0.2)
    left.axvline(0, color=INK, lw=0.8)
    left.set_xlabel(f"{names}, percentage points")
    ordered = np.array(sorted(differences.values(), reverse=True))
    right.bar(np.arange(1, len(ordered) + 1), 100 * ordered, width=0.9, color=np.where(ordered >= 0, BLUE, ORANGE))
    right.axhline(0, color=INK, lw=0.8)
    right.set_xlabel("problem")
    right.set_ylabel(f"{names}, percentage points")
    return png(figure)
