"""`atesd sweep`: the shipped study `fixed-exposure`, at any recipe, exposures and seeds.

Beside the study's table it shows outcome and mismatch against alpha, for thirds of the problems by difficulty: the
paper's preliminary study finds that easy problems prefer more exposure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atesd.config import load_config
from atesd.errors import ConfigError
from atesd.files import write_json
from atesd.reports.printout import Printout, Table
from atesd.studies.reading import load_spec
from atesd.studies.spec import Measure, StudySpec
from atesd.studies.study import run_study
from atesd.studies.study_report import STUDY, WRITTEN, load_study, write_study_report
from atesd.studies.study_report import printout as study_printout

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # [paper]
SEEDS = (0, 1, 2)  # our choice
FIGURE = "sweep.png"
GROUPS = ("easy", "middle", "hard")
SHOWN = ("outcome", "accuracy", "mismatch_p95", "top1_disagreement")


def sweep(
    recipe: str | None,
    flags: list[str],
    output_dir: str,
    alphas: Sequence[float] = ALPHAS,
    seeds: Sequence[int] = SEEDS,
    num_problems: int | None = None,
) -> Path:
    """Runs the study. Returns its folder: that of `run_study`, with `sweep.png`, and `by_difficulty` in `study.json`.

    Args:
        recipe, flags: as for `atesd train`. The sweep sets exposure policy, alpha, seed and output directory; its
            answers are sampled at the recipe's `eval_temperature`.
        output_dir: the folder of the study. It has one folder per run, e.g. `alpha-0.25/seed-1`.
        num_problems: held-out problems; None: the recipe's, or else the study's.

    Raises:
        ConfigError: settings are unusable. Raised before the first run starts.
    """
    if not alphas or not seeds:
        raise ConfigError("a sweep needs at least an alpha and a seed")
    config = load_config(recipe, flags)
    spec = spec_of(recipe, alphas, seeds, num_problems or config.num_eval_problems, config.eval_temperature)
    return run_study(spec, flags, output_dir, written=(*WRITTEN, FIGURE), report=write_sweep_report)


def write_sweep_report(folder: Path) -> Path:
    """Writes what a study has, and sweep.png; adds `by_difficulty` to study.json. Returns `folder`."""
    study = load_study(folder)
    summary = summarise(rows_of(study))
    write_json(folder / STUDY, {**study, "by_difficulty": summary})
    from atesd.studies.sweep_plot import sweep_figure

    sweep_figure(summary, folder / FIGURE)
    return write_study_report(folder)


def spec_of(
    recipe: str | None,
    alphas: Sequence[float],
    seeds: Sequence[int],
    num_problems: int = 0,
    temperature: float = Measure.temperature,
) -> StudySpec:
    shipped = load_spec("fixed-exposure")
    fixed = {"exposure_policy": "fixed", "exposure_kwargs": "{}"}  # whatever the recipe's policy takes
    variants = {f"alpha-{alpha:g}": {**fixed, "fixed_alpha": alpha} for alpha in alphas}
    measure = replace(shipped.measure, problems=num_problems or shipped.measure.problems, temperature=temperature)
    return replace(
        shipped,
        recipe=recipe,
        seeds=tuple(seeds),
        variants=variants,
        baseline=f"alpha-{max(alphas):g}",
        measure=measure,
    )


def printout(folder: Path) -> Printout:
    """Returns what the terminal shows: the study's table, and a row for each alpha and group of problems."""
    told, summary = study_printout(folder), load_study(folder)["by_difficulty"]
    rows = [
        [f"{row['alpha']:g}", row["group"], *(f"{row[name]:.4g} ± {row[f'{name}_std']:.2g}" for name in SHOWN)]
        for row in summary
    ]
    table = Table("by difficulty: mean ± standard deviation over the seeds", rows, ["alpha", "problems", *SHOWN])
    return Printout([*told.parts, table, f"figure: {folder / 'sweep.png'}"], told.data)


def rows_of(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each problem of each run: {alpha, seed, id, before, after}."""
    return [
        {
            "alpha": float(run["variant"].removeprefix("alpha-")),
            "seed": run["seed"],
            "id": name,
            "before": run["before"][name],
            "after": after,
        }
        for run in study["runs"]
        for name, after in run["after"].items()
    ]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the means over seeds and their standard deviations, for each alpha and group of problems.

    The groups are thirds of each seed's problems by difficulty: the untrained student's NLL of the reference.

        outcome            decrease of that NLL through training, in nats per token (higher is better)
        accuracy           share of correct final answers after training
        mismatch_p95       the mismatch tail after training
        top1_disagreement  after training
    """
    out = []
    groups = {(row["seed"], row["id"]): group for row, group in grouped(rows)}
    for alpha in sorted({row["alpha"] for row in rows}):
        for group in ("all", *GROUPS):
            by_seed: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                if row["alpha"] == alpha and group in ("all", groups[row["seed"], row["id"]]):
                    by_seed.setdefault(row["seed"], []).append(row)
            if by_seed:
                out.append({"alpha": alpha, "group": group, **means_over(by_seed.values())})
    return out


def grouped(rows: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], str]]:
    """Yields `(row, group)` for each problem of each seed, by the difficulty measured in that seed's first run."""
    for seed in dict.fromkeys(row["seed"] for row in rows):
        first = {row["id"]: row for row in reversed(rows) if row["seed"] == seed}
        ordered = sorted(first.values(), key=lambda row: row["before"]["reference_nll"])
        for rank, row in enumerate(ordered):
            yield row, GROUPS[rank * len(GROUPS) // len(ordered)]


def means_over(seeds: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for rows in seeds:
        befores, afters = [row["before"] for row in rows], [row["after"] for row in rows]
        fall = [b["reference_nll"] - a["reference_nll"] for b, a in zip(befores, afters, strict=True)]
        values.setdefault("outcome", []).append(statistics.fmean(fall))
        values.setdefault("accuracy", []).append(statistics.fmean(a["average"] for a in afters))
        for name in ("mismatch_p95", "top1_disagreement"):
            values.setdefault(name, []).append(statistics.fmean(a[name] for a in afters))
    means = {name: statistics.fmean(v) for name, v in values.items()}
    return means | {f"{name}_std": statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
