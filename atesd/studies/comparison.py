"""The numbers of a study: every variant's means over seeds, and its differences to the baseline.

Differences are paired: the same seed draws the same problems and sampling seeds for every variant. Problems are
averaged first, so an interval speaks about further seeds, that is about runs of the same recipe. It is Student's t over
the seeds' differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from atesd.errors import ConfigError
from atesd.evaluation.statistics import t_quantile
from atesd.studies.spec import StudySpec
from atesd.studies.trial import Trial

CONFIDENCE = 0.95
METRICS = {
    "average": "share of correct samples (Average@k)",
    "pass": "problems with a correct one among k samples (pass@k)",
    "response_length": "tokens of a response",
    "no_answer": "share of samples without an answer",
    "mismatch": "KL(teacher || student), nats a token",
    "reference_nll": "NLL of the reference, nats a token",
}


def compare_variants(spec: StudySpec, trials: Sequence[Trial]) -> dict[str, Any]:
    """Returns the content of study.json.

    `runs`: every problem's numbers before and after. `variants`: for each metric the mean over seeds after training,
    `change`, after less before, and `difference`, to the baseline, each with its interval.
    """
    results = {(trial.variant, trial.seed): finished(trial) for trial in trials}
    variants = {}
    for name in spec.variants:
        of_metric = {}
        for metric in METRICS:
            after = [mean(results[name, seed]["after"], metric) for seed in spec.seeds]
            before = [mean(results[name, seed]["before"], metric) for seed in spec.seeds]
            base = [paired(results[name, seed], results[spec.baseline, seed], metric) for seed in spec.seeds]
            of_metric[metric] = {
                "mean": statistics.fmean(after),
                "by_seed": after,
                "change": interval([a - b for a, b in zip(after, before, strict=True)]),
                "difference": None if name == spec.baseline else interval(base),
            }
        variants[name] = {"metrics": of_metric, "published": spec.published.get(name)}
        if all(abs(row["mismatch"]) < 1e-9 for seed in spec.seeds for row in results[name, seed]["before"].values()):
            variants[name]["no_signal"] = True  # the teacher read what the student read
    return {
        "study": spec.name,
        "about": spec.about,
        "recipe": spec.recipe,
        "settings": dict(spec.settings),
        "seeds": list(spec.seeds),
        "baseline": spec.baseline,
        "measure": asdict(spec.measure),
        "confidence": CONFIDENCE,
        "variants": variants,
        "runs": [results[trial.variant, trial.seed] for trial in trials],
    }


def finished(trial: Trial) -> dict[str, Any]:
    result = trial.result()
    if result is None:
        raise AssertionError(f"{trial.folder} is not finished: a bug")
    return result


def mean(rows: dict[str, dict[str, float]], metric: str) -> float:
    return statistics.fmean(row[metric] for row in rows.values())


def paired(run: dict[str, Any], baseline: dict[str, Any], metric: str) -> float:
    """Returns the mean over problems of the difference to the same problem's value under the baseline.

    A variant whose prompts are longer may have skipped problems (`overlong_problems`): the others are compared.
    """
    ours, theirs = run["after"], baseline["after"]
    common = [name for name in ours if name in theirs]
    if not common:
        raise ConfigError(f"variant {run['variant']!r} shares no held-out problem with {baseline['variant']!r}")
    return statistics.fmean(ours[name][metric] - theirs[name][metric] for name in common)


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean and its t interval over seeds; without an interval for a single seed.

    >>> interval([1.0, 2.0, 3.0])["value"], interval([1.0])
    (2.0, {'value': 1.0, 'low': None, 'high': None})
    """
    value, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"value": value, "low": None, "high": None}
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return {"value": value, "low": value - half, "high": value + half}
