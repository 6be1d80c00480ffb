"""`atesd sweep`: the paper's fixed-exposure study, with one run per alpha and seed, and its figure.

Trains the runs one after the other, and measures each on the same held-out problems before and after training. A
stopped sweep can be resumed: it skips finished runs, and resumes an unfinished run from its latest checkpoint. Nothing
is deleted: a folder that no sweep made is refused.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atesd.config import CONFIG_FILE, ATESDConfig, load_config
from atesd.config.checks import check_same_settings
from atesd.errors import ConfigError
from atesd.files import write_json
from atesd.reports.printout import Printout, Table
from atesd.run import Run
from atesd.storage.folder import LOCK, own
from atesd.studies.held_out import measure
from atesd.terminal import show
from atesd.trainer import Trainer

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # [paper]
SEEDS = (0, 1, 2)  # our choice
NUM_PROBLEMS = 24  # our choice, used if the recipe has no evaluation problems
GROUPS = ("easy", "middle", "hard")
MEASURED = ("outcome", "accuracy", "mismatch_p95", "top1_disagreement")
STUDY, BEFORE = "study.json", "before.json"


def sweep(
    recipe: str | None,
    flags: list[str],
    output_dir: str,
    alphas: Sequence[float] = ALPHAS,
    seeds: Sequence[int] = SEEDS,
) -> Path:
    """Runs the study. Returns the folder with its runs, `study.json` (every number) and `study.png` (the figure).

    Args:
        recipe, flags: as for `atesd train`. The sweep sets exposure policy, alpha, seed and output directory.
        output_dir: the folder of the study. It has one folder per run, e.g. `alpha-0.25-seed-1`.

    Raises:
        ConfigError: settings are unusable. Raised before the first run starts.
    """
    folder = Path(output_dir)
    if not alphas or not seeds:
        raise ConfigError("a sweep needs at least an alpha and a seed")
    runs = {(alpha, seed): folder / f"alpha-{alpha:g}-seed-{seed}" for seed in seeds for alpha in alphas}
    with own(folder, "output_dir") as owned:  # no other sweep runs here: what is there now stays as it is
        try:
            # all settings, before the first run starts
            configs = [run_config(recipe, flags, run_dir, *of_run) for of_run, run_dir in runs.items()]
            rows: list[dict[str, Any]] = []
            for ((alpha, seed), run_dir), config in zip(runs.items(), configs, strict=True):
                if not (run_dir / STUDY).exists():
                    show(f"alpha {alpha:g}, seed {seed}: {run_dir}")
                    run_one(config, alpha, seed)
                rows += json.loads((run_dir / STUDY).read_text(encoding="utf-8"))
        except BaseException:
            owned.discard()  # the folder goes if there is no run in it
            raise
        write_json(folder / STUDY, {"rows": rows, "summary": summarise(rows)})
        from atesd.studies.sweep_plot import study_figure  # here: without matplotlib, load_config says what to install

        study_figure(summarise(rows), folder / "study.png")
    return folder


def run_config(recipe: str | None, flags: list[str], run_dir: Path, alpha: float, seed: int) -> ATESDConfig:
    """Returns the settings of one run, which goes on if `run_dir` holds it already.

    Raises:
        ConfigError: the folder holds something else, or a run with other settings. The runs of a study may differ only
            in alpha and seed.
    """
    fixed = {"exposure_policy": "fixed", "exposure_kwargs": "{}", "fixed_alpha": alpha, "seed": seed}
    of_the_sweep = [flag for name, value in fixed.items() for flag in (f"--{name}", str(value))]
    goes_on = (run_dir / CONFIG_FILE).is_file()
    if not goes_on and run_dir.exists() and any(path.name != LOCK for path in run_dir.iterdir()):
        raise ConfigError(f"{run_dir} exists, and no sweep made it: move it, or choose another output_dir")
    new_dir = run_dir / "new" if goes_on else run_dir  # load_config refuses a folder that holds a run
    config = load_config(recipe, [*flags, *of_the_sweep, "--output_dir", str(new_dir)])
    if config.rollout_engine != "hf":
        raise ConfigError(
            "rollout_engine is not 'hf': a sweep measures the student before and after each run in its own process"
        )
    if config.push_to_hub:
        raise ConfigError("push_to_hub is set: a sweep has many runs, and one repository holds one. Leave it out")
    config.num_eval_problems = config.num_eval_problems or NUM_PROBLEMS
    if not goes_on:
        return config
    saved = load_config(None, ["--resume", str(run_dir)])
    settled = ["resume", "output_dir", *(["bf16"] if config.bf16 is None else [])]
    check_same_settings(saved, config, settled, f"the run in {str(run_dir)!r}", "or choose another output_dir")
    return saved


def run_one(config: ATESDConfig, alpha: float, seed: int) -> None:
    """Trains one run. Writes its measurements before and after training, per held-out problem, to its study.json."""
    config.validate()
    with closing(Run.build(config)) as run:
        problems, run_dir = run.data.problems.eval, run.run_dir
        before_file = run_dir / BEFORE
        if not before_file.exists():
            write_json(before_file, [asdict(m) for m in measure(run, problems, alpha)])
        before = json.loads(before_file.read_text(encoding="utf-8"))
        Trainer(run).train()
        after = [asdict(m) for m in measure(run, problems, alpha)]
    of_the_run = {"alpha": alpha, "seed": seed}
    rows = [{**of_the_run, "id": b["id"], "before": b, "after": a} for b, a in zip(before, after, strict=True)]
    write_json(run_dir / STUDY, rows)
    del run
    gc.collect()  # breaks reference cycles, since the next run needs the memory


def printout(folder: Path) -> Printout:
    """Returns what the terminal shows of a finished study: its summary, a row for each alpha and group of problems."""
    study = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    columns = [name for name in MEASURED if all(name in row for row in study["summary"])]
    rows = [
        [f"{row['alpha']:g}", row["group"], *(f"{row[name]:.4g} ± {row[f'{name}_std']:.2g}" for name in columns)]
        for row in study["summary"]
    ]
    figure = folder / "study.png"
    table = Table("mean ± standard deviation over the seeds", rows, ["alpha", "problems", *columns])
    return Printout([table, f"figure: {figure}"], {**study, "folder": str(folder), "figure": str(figure)})


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the means over seeds and their standard deviations, for each alpha and group of problems.

    The groups are thirds of each seed's problems by difficulty: the untrained student's NLL of the reference.

        outcome            decrease of that NLL through training, in nats per token (higher is better)
        accuracy           share of correct final answers after training; absent without math-verify
        mismatch_p95       the mismatch tail after training
        top1_disagreement  after training
    """
    out = []
    groups = {(row["seed"], row["id"]): group for row, group in grouped(rows)}
    for alpha in sorted({row["alpha"] for row in rows}):
        for group in ("all", *GROUPS):
            by_seed = {}
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
        for name in ("mismatch_p95", "top1_disagreement"):
            values.setdefault(name, []).append(statistics.fmean(a[name] for a in afters))
        if all(a["correct"] is not None for a in afters):
            values.setdefault("accuracy", []).append(statistics.fmean(a["correct"] for a in afters))
    means = {name: statistics.fmean(v) for name, v in values.items()}
    return means | {f"{name}_std": statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
