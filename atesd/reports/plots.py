"""Plots of a run's report. Each function maps rows of metrics to a PNG as a data URI; report.py lays out the page."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN, GREY = "#1f2430", "#2f6db5", "#e07b39", "#3c8d5a", "#9aa3b2"
PHASES = ("rollout", "teacher", "student", "loss_backward", "optimizer", "probe")
PHASE_COLOURS = ("#2f6db5", "#e07b39", "#3c8d5a", "#b5493a", "#8a6fb0", "#c9a227")
STYLE = {
    "font.size": 9,
    "axes.edgecolor": "#c7ccd6",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff4",
    "xtick.color": "#5b6472",
    "ytick.color": "#5b6472",
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Row = dict[str, Any]


def series(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(steps, values)` of one metric, both `(points,)`, at the steps that have it."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smooth(values: np.ndarray, decay: float = 0.8) -> np.ndarray:
    """Bias-corrected exponential moving average."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(average / weight)
    return np.array(out)


def beta_density(a: float, b: float, grid: np.ndarray) -> np.ndarray:
    """Density of Beta(a, b) at each point of `grid`, which lies inside (0, 1)."""
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return np.exp(log_norm + (a - 1) * np.log(grid) + (b - 1) * np.log1p(-grid))


@matplotlib.rc_context(STYLE)
def exposure_plot(rows: list[Row]) -> str | None:
    """Plots alpha by step, over a heat map of the density of the Beta policy from which it was sampled."""
    steps, alphas = series(rows, "alpha")
    if not len(steps):
        return None
    figure, axes = canvas(10.4, 3.3)
    density_rows = [row for row in rows if row.get("beta_a") and row.get("beta_b")]
    if density_rows:
        grid = (np.arange(240) + 0.5) / 240
        edges = np.array([row["step"] - 0.5 for row in density_rows] + [density_rows[-1]["step"] + 0.5])
        density = np.array([beta_density(row["beta_a"], row["beta_b"], grid) for row in density_rows]).T
        # Scale colours to the maximum density, capped so that one narrow peak does not make the rest pale.
        top = max(2.0, min(float(density.max()), 6.0))
        mesh = axes.pcolormesh(edges, np.linspace(0, 1, 241), density, cmap="Blues", vmin=0, vmax=top)
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.03)
        bar.set_label("density of the policy")
        bar.outline.set_visible(False)
        means = [row["beta_a"] / (row["beta_a"] + row["beta_b"]) for row in density_rows]
        at = [row["step"] for row in density_rows]
        axes.plot(at, means, color=INK, lw=1, ls=(0, (4, 3)), label="mean of the policy")
    # Step s spans s - 0.5 to s + 0.5, like its column in the heat map.
    axes.stairs(
        alphas, np.append(steps - 0.5, steps[-1] + 0.5), baseline=None, color=ORANGE, lw=2, label="sampled alpha"
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.set_ylabel("exposure alpha")
    axes.grid(False)
    figure.legend(loc="outside upper right", ncols=2)
    return png(figure)


@matplotlib.rc_context(STYLE)
def line_plot(rows: list[Row], keys: dict[str, str], ylabel: str = "") -> str | None:
    """Plots metrics `{key: label}` by step. From 40 points on, shows them faint with a smoothed line on top."""
    figure, axes = canvas(5.1, 2.6)
    drawn = 0
    for (key, label), colour in zip(keys.items(), (BLUE, ORANGE, GREEN), strict=False):
        steps, values = series(rows, key)
        if not len(steps):
            continue
        drawn += 1
        enough = len(steps) >= 40  # with fewer, the lag of the average outweighs the smoothing
        marker = "o" if len(steps) <= 60 else None
        axes.plot(steps, values, color=colour, lw=1, alpha=0.35 if enough else 1, marker=marker, ms=3, mew=0)
        axes.plot(steps, smooth(values) if enough else values, color=colour, lw=2, label=label)
    if not drawn:
        return None
    if len(keys) > 1:
        axes.legend(loc="best")
    axes.set_ylabel(ylabel)
    return png(figure)


@matplotlib.rc_context(STYLE)
def phases_plot(rows: list[Row]) -> str | None:
    """Plots the seconds of each step as stacked bars, one colour per phase."""
    timed = [row for row in rows if any(f"seconds_{phase}" in row for phase in PHASES)]
    if not timed:
        return None
    figure, axes = canvas(5.1, 2.6)
    steps = np.array([row["step"] for row in timed])
    below = np.zeros(len(timed))
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        seconds = np.array([row.get(f"seconds_{phase}") or 0.0 for row in timed])
        if seconds.any():
            axes.bar(steps, seconds, bottom=below, width=1.0, color=colour, label=phase.replace("_", " + "))
            below += seconds
    axes.set_ylabel("seconds per step")
    axes.set_ylim(0, float(below.max()) * 1.35)
    axes.legend(loc="upper center", ncols=3)
    return png(figure)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def png(figure: Figure) -> str:
    """Returns the figure as a data URI, so that the page is self-contained."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
