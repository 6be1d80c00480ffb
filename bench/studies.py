"""The studies in the lab: their tables, and which of the paper's statements hold there.

    atesd study lab-exposure --output_dir bench/results/studies/lab-exposure --jobs 2

makes the runs that are missing, where `atesd lab` has made the lab with the committed model. Only what each run has
measured is committed, problem by problem; the tables are computed from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from atesd.reports.learned import interval as with_interval
from atesd.reports.markup import markdown_table
from atesd.studies.comparison import interval, mean, paired
from atesd.studies.reading import load_spec
from atesd.studies.trial import MEASURED, read_result
from bench.machine import RESULTS

FOLDER = "studies"
EXPOSURE, CREDIT, CONTROLS, MENDING = "lab-exposure", "lab-credit", "lab-controls", "lab-mending"
SHOWN = (EXPOSURE, CREDIT, CONTROLS, MENDING)
FIXED = ("fixed-0", "fixed-0.25", "fixed-0.5", "fixed-0.75")
HOLDS, FAILS, OPEN = "holds", "does not hold", "open"

Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what was measured


@cache
def runs_of(study: str) -> Runs:
    """Returns the runs of a study at the seeds that all of its variants have. Reads them once a process.

    Raises:
        FileNotFoundError: there is no such seed.
    """
    spec, folder = load_spec(study), RESULTS / FOLDER / study
    found: Runs = {name: {} for name in spec.variants}
    for seed in spec.seeds:
        files = {name: folder / name / f"seed-{seed}" / MEASURED for name in spec.variants}
        if all(file.is_file() for file in files.values()):
            for name, file in files.items():
                found[name][seed] = read_result(file)
    if not all(found.values()):
        raise FileNotFoundError(f"{folder} has no seed with all variants")
    return found


def table(study: str) -> str:
    """Means over seeds after training, the change through training, and the difference to the baseline."""
    runs, spec = runs_of(study), load_spec(study)
    rows = []
    for name, of_seed in runs.items():
        after, before = (averages(of_seed, when) for when in ("after", "before"))
        less = differences(runs, name, spec.baseline) if name != spec.baseline else None
        rows.append(
            [f"{name}, {spec.variants[name]['learning_rate']:g}", shown(interval(after))]
            + [shown(interval([a - b for a, b in zip(after, before, strict=True)]), "+")]
            + ["" if less is None else shown(interval(less), "+")]
            + [f"{statistics.fmean(averages(of_seed, 'after', metric)):.3f}" for metric in ("pass", "reference_nll")]
        )
    k, count = spec.measure.k, spec.measure.problems
    header = ["variant, learning rate", f"average@{k}", "after - before", f"less {spec.baseline}", f"pass@{k}"]
    note = f"{len(after)} seeds, {count} held-out problems; 95 % intervals over seeds, paired by seed and problem."
    return f"{markdown_table([*header, 'reference NLL'], rows)}\n\n<sub>{note}</sub>"


def averages(of_seed: dict[int, dict[str, Any]], when: str, metric: str = "average") -> list[float]:
    return [mean(result[when], metric) for result in of_seed.values()]


def differences(runs: Runs, name: str, other: str) -> list[float]:
    """One for each seed: the mean over problems of Average@k of `name` less that of `other`."""
    return [paired(runs[name][seed], runs[other][seed], "average") for seed in runs[name]]


def best(runs: Runs, names: Sequence[str]) -> str:
    return max(names, key=lambda name: statistics.fmean(averages(runs[name], "after")))


def shown(estimate: dict[str, float | None], sign: str = "") -> str:
    return with_interval(estimate, sign, digits=3)


def verdict(estimates: Sequence[dict[str, float | None]]) -> str:
    """Whether all of the differences are positive, as far as their intervals say."""
    if any(e["high"] is not None and e["high"] < 0 for e in estimates):
        return FAILS
    return HOLDS if all(e["low"] is not None and e["low"] > 0 for e in estimates) else OPEN


def growing_mismatch(runs: Runs) -> tuple[str, list[dict[str, float | None]]]:
    """KL(teacher || student) before training, at each exposure, and its growth from each to the next."""
    levels = [averages(runs[name], "before", "mismatch") for name in (*FIXED, "full")]
    told = ", ".join(f"{statistics.fmean(level):.2f}" for level in levels)
    growth = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(levels)]
    return f"KL at alpha 0, .25, .5, .75, 1: {told}", [interval(each) for each in growth]


def compared(study: str, ours: Sequence[str], theirs: Sequence[str]) -> Callable[[], tuple[str, list[Any]]]:
    """The best of `ours` against the best of `theirs`."""

    def build() -> tuple[str, list[Any]]:
        runs = runs_of(study)
        one, other = best(runs, ours), best(runs, theirs)
        found = interval(differences(runs, one, other))
        return f"{one} less {other}: {shown(found, '+')}", [found]

    return build


STATEMENTS: dict[str, Callable[[], tuple[str, list[Any]]]] = {
    "the mismatch before training grows with exposure": lambda: growing_mismatch(runs_of(EXPOSURE)),
    "a fixed exposure below 1 beats full exposure": compared(EXPOSURE, FIXED, ["full"]),
    "learned exposure beats full exposure": compared(EXPOSURE, ["learned"], ["full"]),
    "learned exposure beats the best fixed one below 1": compared(EXPOSURE, ["learned"], FIXED),
    "learned exposure beats random exposure": compared(EXPOSURE, ["learned"], ["random"]),
    "look-ahead beats a one-step reward": compared(CREDIT, ["full-reward"], ["one-step"]),
    "look-ahead beats a short delay": compared(CREDIT, ["full-reward"], ["short-delay"]),
    "the grounded term helps": compared(CREDIT, ["full-reward"], ["no-grounded-term"]),
    "the own reference beats another problem's": compared(CONTROLS, ["own"], ["other-problem"]),
    "the own reference beats one with a wrong answer": compared(CONTROLS, ["own"], ["wrong-answer"]),
    "the whole reference beats the answer alone": compared(CONTROLS, ["own"], ["answer-only"]),
    "self-distillation beats SFT on as many problems": compared(CONTROLS, ["own"], ["sft"]),
    "self-distillation beats GRPO on as many responses": compared(CONTROLS, ["own"], ["grpo"]),
}


def statements() -> str:
    """Returns the table of statements whose study has results."""
    rows = []
    for text, build in STATEMENTS.items():
        try:
            told, estimates = build()
        except FileNotFoundError:
            continue
        rows.append([text, told, verdict(estimates)])
    return markdown_table(["statement", "in the lab, average@4", "verdict"], rows)
