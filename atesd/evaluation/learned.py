"""Keeps the answers of each evaluation during training, and compares them with those before training.

`reports/learned.py` shows the comparison.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from atesd.data.problems import Problem
from atesd.evaluation.answers import Sample
from atesd.evaluation.statistics import estimate
from atesd.files import write_atomically, write_json
from atesd.reports.learned import ANSWERS, COMPARISON, read_comparison

CONFIDENCE, NUM_BOOTSTRAP = 0.95, 2_000


def keep_answers(run_dir: Path, step: int, problems: Sequence[Problem], samples: Sequence[Sample]) -> None:
    """Writes answers/step-N.jsonl, a line for each sample with its problem, and the comparison with step 0."""
    by_id = {problem.id: {"problem": problem.text, "answer": problem.answer} for problem in problems}
    lines = [json.dumps({**by_id[sample["problem_id"]], **sample}) + "\n" for sample in samples]
    (run_dir / ANSWERS).mkdir(exist_ok=True)
    write_atomically(file_of(run_dir, step), "".join(lines))
    if step and file_of(run_dir, 0).is_file():
        try:
            compare(run_dir, step)
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{file_of(run_dir, 0)} is damaged ({error!r}), so nothing says what was answered before training",
                stacklevel=2,
            )


def forget_answers_after(run_dir: Path, step: int) -> None:
    """Removes what evaluations after `step` have left: a run that goes on from there makes them again."""
    for file in (run_dir / ANSWERS).glob("step-*.jsonl"):
        number = file.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            file.unlink()
    found = read_comparison(run_dir)
    if found is None or found["step"] > step:
        (run_dir / COMPARISON).unlink(missing_ok=True)


def compare(run_dir: Path, step: int) -> None:
    """Writes answers/comparison.json: `{step, num_problems, before, after, change, example}`.

    `before`, `after` and `change` are shares of correct samples as {value, low, high}; their intervals resample the
    problems that both evaluations have, and `change` is paired by problem. `example` is a problem whose verdict went
    the way of the change, if there is one: its first sample before and after.
    """
    before, after = (read_answers(file_of(run_dir, at)) for at in (0, step))
    common = [name for name in before if name in after]
    if not common:
        return  # the run goes on with other problems
    right = np.array([[share_right(samples[name]) for samples in (before, after)] for name in common])
    change = right[:, 1] - right[:, 0]
    estimates = estimate(np.column_stack([right, change]), CONFIDENCE, NUM_BOOTSTRAP)
    shown = common[int(np.argmax(change if change.mean() >= 0 else -change))]
    content = {
        "step": step,
        "num_problems": len(common),
        **dict(zip(("before", "after", "change"), map(asdict, estimates), strict=True)),
        "example": [before[shown][0], after[shown][0]],
    }
    write_json(run_dir / COMPARISON, content)


def file_of(run_dir: Path, step: int) -> Path:
    return run_dir / ANSWERS / f"step-{step}.jsonl"


def read_answers(path: Path) -> dict[str, list[Sample]]:
    by_problem: dict[str, list[Sample]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            by_problem[sample["problem_id"]].append(sample)
    return by_problem


def share_right(samples: Sequence[Sample]) -> float:
    return sum(sample["correct"] for sample in samples) / len(samples)
