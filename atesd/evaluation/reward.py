"""Verifier rewards for rollouts, and GRPO's group-relative advantages.

This file works on text and answers; objectives.py works on hidden states. The grader is that of evaluation
(`grading/grader.py`), with its rules for responses that were cut off: reward 1 if the final answer is correct, else 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from atesd.data.problems import Problem
from atesd.data.thinking import decode_response
from atesd.evaluation.grading.grader import Grader
from atesd.rollout import Rollout


class VerifierReward:
    """Grades responses with math-verify.

    Args:
        tokenizer: decodes the responses.
        num_generations: responses per problem. They are consecutive and form a group.
        box_only: whether only a box counts as an answer, as in the run's evaluations.

    Raises ImportError without math-verify.
    """

    def __init__(self, tokenizer: Any, num_generations: int, box_only: bool = False):
        self.tokenizer, self.num_generations = tokenizer, num_generations
        self.grader = Grader(box_only=box_only)

    def rewards(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[float]:
        """Returns 1.0 for each response with a correct final answer, else 0.0."""
        texts = [decode_response(self.tokenizer, r.prompt_ids, r.response_ids) for r in rollouts]
        golds, cut_off = [p.answer for p in problems], [r.cut_off for r in rollouts]
        return [float(verdict.correct) for verdict in self.grader.grade_many(texts, golds, cut_off)]

    def advantages(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout]
    ) -> tuple[list[float], dict[str, float]]:
        """Returns `(advantages, metrics)`: the advantage of each response within its group, and values to log."""
        rewards = self.rewards(problems, rollouts)
        advantages = group_advantages(rewards, self.num_generations)
        silent = sum(not any(advantages[i : i + self.num_generations]) for i in self.groups(rewards))
        metrics = {
            "verifier_reward": statistics.fmean(rewards),
            "groups_without_signal": silent * self.num_generations / len(rewards),
        }
        return advantages, metrics

    def groups(self, rewards: Sequence[float]) -> range:
        return range(0, len(rewards), self.num_generations)


def group_advantages(rewards: Sequence[float], group: int, eps: float = 1e-4) -> list[float]:
    """`A_i = (r_i - mean) / (std + eps)` within each group of `group` consecutive rewards (GRPO, arXiv 2402.03300).

    `std` is the sample standard deviation, and eps = 1e-4, as in TRL. If all responses of a group are correct, or all
    wrong, the advantages are zero and the group gives no learning signal.

    >>> [round(a, 2) for a in group_advantages([1.0, 0.0, 1.0, 1.0], group=2)]
    [0.71, -0.71, 0.0, 0.0]
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group}; a group needs at least 2 responses")
    out: list[float] = []
    for start in range(0, len(rewards), group):
        part = rewards[start : start + group]
        mean, std = statistics.fmean(part), statistics.stdev(part)
        out += [(r - mean) / (std + eps) for r in part]
    return out
