"""The studies with results: their tables, and which of the paper's statements hold in the lab.

    atesd study quickstart --output_dir bench/results/studies/quickstart --jobs 2

makes the runs that are missing. The lab's studies go on where `atesd lab` has made the lab with the committed model.
Only what each run has measured is committed, problem by problem; the tables are computed from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from atesd.evaluation.statistics import estimate
from atesd.reports.learned import interval as with_interval
from atesd.reports.markup import markdown_table
from atesd.studies.comparison import interval, mean, paired
from atesd.studies.reading import load_spec
from atesd.studies.trial import MEASURED, read_result
from bench import machine

FOLDER = "studies"
EXPOSURE, CREDIT, CONTROLS, MENDING = "lab-exposure", "lab-credit", "lab-controls", "lab-mending"
SHOWN = (EXPOSURE, CREDIT, CONTROLS, MENDING)
QUICKSTART = "quickstart"
FIXED = ("fixed-0", "fixed-0.25", "fixed-0.5", "fixed-0.75")
HOLDS, FAILS, OPEN = "holds", "does not hold", "open"

read_once = cache(read_result)
Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what was measured


def finished(study: str) -> Runs:
    """Returns the runs of a study that have results, without the variants that have none.

    Raises:
        FileNotFoundError: no run has results.
    """
    spec, folder = load_spec(study), machine.RESULTS / FOLDER / study
    found: Runs = {}
    for name in spec.variants:
        files = {seed: folder / name / f"seed-{seed}" / MEASURED for seed in spec.seeds}
        if of_seed := {seed: read_once(file) for seed, file in files.items() if file.is_file()}:
            found[name] = of_seed
    if not found:
        raise FileNotFoundError(f"{FOLDER}/{study}")
    return found


def runs_of(study: str) -> Runs:
    """Returns the runs of a study at the seeds that all of its variants have.

    Raises:
        FileNotFoundError: there is no such seed.
    """
    found, spec = finished(study), load_spec(study)
    seeds = [seed for seed in spec.seeds if all(seed in found.get(name, {}) for name in spec.variants)]
    if not seeds:
        raise FileNotFoundError(f"{FOLDER}/{study}")
    return {name: {seed: found[name][seed] for seed in seeds} for name in spec.variants}


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


def before_and_after(study: str) -> str:
    """What training changed, for each variant that has results, over the seeds that it has."""
    runs, spec = finished(study), load_spec(study)
    rows = []
    for name, of_seed in runs.items():
        changes = [change_of(run) for run in of_seed.values()]
        above = sum((low := estimate(change)[0].low) is not None and low > 0 for change in changes)
        less = differences(runs, name, spec.baseline) if name != spec.baseline else []
        rows.append(
            [name, before_to_after(of_seed, "average", ".2f")]
            + [with_interval(interval([float(change.mean()) for change in changes]), "+"), f"{above} of {len(changes)}"]
            + [with_interval(interval(less), "+") if less else ""]
            + [before_to_after(of_seed, "response_length", ".1f"), before_to_after(of_seed, "no_answer", ".2f")]
        )
    header = ["variant", "held-out accuracy", "change", "seeds that learn", f"less {spec.baseline}"]
    note = (
        f"{spec.measure.problems} held-out problems, k = {spec.measure.k}, temperature {spec.measure.temperature:g}. "
        "Intervals are of 95 %, over seeds, paired by seed and problem. A seed learns if the bootstrap interval of its "
        "change, over its own problems, is above 0."
    )
    return f"{markdown_table([*header, 'tokens of a response', 'without an answer'], rows)}\n\n<sub>{note}</sub>"


def change_of(run: dict[str, Any]) -> np.ndarray:
    """Right after training less right before, of each problem: `(problems,)`."""
    before, after = run["before"], run["after"]
    return np.array([after[name]["average"] - before[name]["average"] for name in before])


def before_to_after(of_seed: dict[int, dict[str, Any]], metric: str, form: str) -> str:
    return " → ".join(f"{statistics.fmean(averages(of_seed, when, metric)):{form}}" for when in ("before", "after"))


def averages(of_seed: dict[int, dict[str, Any]], when: str, metric: str = "average") -> list[float]:
    return [mean(result[when], metric) for result in of_seed.values()]


def differences(runs: Runs, name: str, other: str) -> list[float]:
    """One for each seed of both: the mean over problems of Average@k of `name` less that of `other`."""
    both = [seed for seed in runs[name] if seed in runs.get(other, {})]
    return [paired(runs[name][seed], runs[other][seed], "average") for seed in both]


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
