"""What `gpu.json` holds, as text and one figure."""

from __future__ import annotations

import importlib
from pathlib import Path

from bench.gpu.stage import DRY_NOTE


def markdown(result: dict) -> str:
    """Every stage's table, then what was left out."""
    from bench.gpu.__main__ import STAGES

    stages = result.get("stages", {})
    lines = [DRY_NOTE] if result.get("dry") else []
    for name, _ in STAGES.values():
        if name not in stages:
            continue
        try:
            text = importlib.import_module(f"bench.gpu.{name}").table(stages[name])
        except Exception as error:  # a stage that was cut short has no more than it kept
            text = f"(no table: {type(error).__name__}: {error})"
        lines += [f"### {name.replace('_', ' ')}", "", text, ""]
    left_out = result.get("left_out", {})
    if left_out:
        lines += ["### not measured", "", *(f"- {what}: {why}" for what, why in left_out.items()), ""]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Time of each entrant of the headline, one bar a head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    headline = result.get("stages", {}).get("headline", {})
    heads = [head for head in ("frozen", "trained") if headline.get(f"{head}, with peers") or headline.get(head)]
    if not heads:
        return
    figure, axes = pyplot.subplots(1, len(heads), figsize=(6 * len(heads), 4), squeeze=False)
    for axis, head in zip(axes[0], heads, strict=True):
        rows = (headline.get(f"{head}, with peers") or headline[head])["rows"]
        times = {name: 1e3 * row["median"] for name, row in rows.items() if "median" in row}
        ordered = sorted(times, key=times.__getitem__, reverse=True)
        axis.barh(ordered, [times[name] for name in ordered], color="tab:blue")
        axis.bar_label(axis.containers[0], fmt="%.0f")
        axis.set_xlabel(f"ms, forward and backward, {head} head")
    name = result.get("stages", {}).get("card", {}).get("card", {}).get("name", "")
    figure.suptitle(f"Forward KL, N {headline['tokens']:,}, {headline['shape']}, {name}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
