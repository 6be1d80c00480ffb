"""The core of an evaluation: samples k answers per problem, grades them and computes metrics.

Shared by `atesd eval` (command.py) and evaluation during training (training.py). Batches depend only on the settings.
A resumed evaluation samples an interrupted batch again in full and keeps only the missing samples, so it gives the same
samples as an uninterrupted one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from atesd.data.problems import Problem
from atesd.data.thinking import decode_response
from atesd.evaluation.files import sample_seed
from atesd.evaluation.grading.grader import Grader
from atesd.evaluation.statistics import estimate, majority_vote, pass_at, pass_at_levels
from atesd.evaluation.votes import votes
from atesd.models.batching import chunks
from atesd.rollout import RolloutEngine, Sampling

Sample = dict[str, Any]


@dataclass(frozen=True)
class EvalProtocol:
    """Sampling settings of an evaluation: `k` samples per problem, `batch_size` of them at a time."""

    k: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    batch_size: int

    def sampling(self, seeds: tuple[int, ...]) -> Sampling:
        return Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k, seeds)


def answers(
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    engine: RolloutEngine,
    tokenizer: Any,
    grader: Grader,
    protocol: EvalProtocol,
    done: frozenset[tuple[str, int]] = frozenset(),
) -> Iterator[list[Sample]]:
    """Samples `k` answers per problem and grades them. Yields them batch by batch, without those in `done`.

    Args:
        prompts: token ids of one prompt per problem.
        done: (problem id, sample index) of existing samples.

    Yields:
        Lists of samples with keys `problem_id`, `sample`, `seed`, `text`, `extracted`, `correct`, `reason` (from the
        grader), `finish_reason` ("stop", "length", or "nonfinite" for non-finite logits), `num_tokens`.
    """
    grid = [(index, sample) for index in range(len(problems)) for sample in range(protocol.k)]
    for part in chunks(len(grid), protocol.batch_size):
        batch = [(problems[index], prompts[index], sample) for index, sample in grid[part]]
        if all((problem.id, sample) in done for problem, _, sample in batch):
            continue
        seeds = tuple(sample_seed(protocol.seed, problem.id, sample) for problem, _, sample in batch)
        rollouts = engine.generate([prompt for _, prompt, _ in batch], protocol.sampling(seeds))
        texts = [decode_response(tokenizer, rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
        golds, cut_off = [problem.answer for problem, _, _ in batch], [rollout.cut_off for rollout in rollouts]
        verdicts = grader.grade_many(texts, golds, cut_off)
        yield [
            {
                "problem_id": problem.id,
                "sample": sample,
                "seed": seed,
                "text": text,
                **asdict(verdict),
                "finish_reason": "length" if rollout.truncated else "stop" if rollout.finite else "nonfinite",
                "num_tokens": len(rollout.response_ids),
            }
            for (problem, _, sample), seed, rollout, text, verdict in zip(
                batch, seeds, rollouts, texts, verdicts, strict=True
            )
            if (problem.id, sample) not in done
        ]


def summarise(
    samples: Sequence[Sample],
    k: int,
    grader: Grader,
    confidence: float,
    num_bootstrap: int,
    metrics: Mapping[str, Callable[[list[Sample]], float]] | None = None,
) -> dict[str, Any]:
    """Returns `{"metrics": {name: {value, low, high}}, "problems": {id: {metric: value}}}`. Needs all samples.

    Each metric is a mean over problems: `average@k` (share of correct samples), unbiased `pass@j`, `maj@k`,
    `response_length` in tokens, `truncated` (share cut off at the limit), `no_answer` (share without an answer), and
    `metrics`, each a function of the samples of one problem.
    """
    by_problem: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_problem[sample["problem_id"]].append(sample)
    rows: dict[str, dict[str, float]] = {}
    for (name, own), cast in zip(by_problem.items(), votes(list(by_problem.values()), grader), strict=True):
        correct = [s["correct"] for s in own]
        rows[name] = {
            f"average@{k}": sum(correct) / k,
            **{f"pass@{j}": pass_at(j, sum(correct), k) for j in pass_at_levels(k)},
            f"maj@{k}": majority_vote(cast, correct),
            "response_length": sum(s["num_tokens"] for s in own) / k,
            "truncated": sum(s["finish_reason"] == "length" for s in own) / k,
            "no_answer": sum(s["extracted"] is None for s in own) / k,
            **{label: float(metric(own)) for label, metric in (metrics or {}).items()},
        }
    table = np.array([list(row.values()) for row in rows.values()])
    names = list(next(iter(rows.values())))
    estimates = estimate(table, confidence, num_bootstrap)
    return {"metrics": dict(zip(names, map(asdict, estimates), strict=True)), "problems": rows}
