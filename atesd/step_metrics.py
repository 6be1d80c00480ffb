"""Computes a step's lines of metrics.jsonl and samples.jsonl. `atesd/README.md` has a table of every field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atesd.config import ATESDConfig
from atesd.data.answers import answer_end
from atesd.data.problems import Problem
from atesd.data.reading.leakage import TeacherWording
from atesd.objectives import TokenTotals
from atesd.rollout import Rollout

NGRAM = 4


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns means over a step's responses: length in tokens, truncated fraction, repetition, and staleness."""
    values = {
        "response_length": [r.num_tokens for r in rollouts],
        "truncated_fraction": [r.truncated for r in rollouts],
        "repetition": [repetition(r.counted(r.response_ids)) for r in rollouts],
        "staleness": [r.staleness for r in rollouts],
    }
    return {name: sum(column) / len(rollouts) for name, column in values.items()}


def text_metrics(
    tokenizer: Any, wording: TeacherWording, problems: Sequence[Problem], rollouts: Sequence[Rollout]
) -> dict[str, float]:
    """Returns means over a step's responses: `end_of_turn_rate`, the share that ended by itself; `after_answer`, the
    share of their characters that follow the last answer; and `context_leakage`, the share that echoes the teacher's
    templates and not its problem's solution."""
    after, echoed = [], []
    for problem, rollout in zip(problems, rollouts, strict=True):
        written = rollout.counted(rollout.response_ids)
        prompt, response = (tokenizer.decode(ids) for ids in (rollout.prompt_ids, written))
        after.append(len(response[answer_end(response) :].strip()) / max(1, len(response)))
        echoed.append(wording.echoed(response, prompt, problem.solution))
    ended = [rollout.finite and not rollout.truncated for rollout in rollouts]
    values = {"end_of_turn_rate": ended, "after_answer": after, "context_leakage": echoed}
    return {name: sum(column) / len(rollouts) for name, column in values.items()}


def repetition(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """Returns the share of a response's n-grams that occurred earlier in it: 0 for none, near 1 for a loop.

    >>> repetition([1, 2, 3, 4, 5, 6]), round(repetition([7, 8] * 50), 2)
    (0.0, 0.98)
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def clip_fraction(
    config: ATESDConfig, loss: float, totals: TokenTotals, mismatch: float | None, of_weighted: bool = False
) -> dict[str, float]:
    """Returns `{"clip_fraction": ...}`, the share that the clip removes; {} if it is unknown.

    With `token_clip` c, it is the share of tokens whose divergence exceeds c. With `entry_clip`, it is the share of the
    step's mean divergence that is missing from the loss, 1 - loss / mismatch, because a token's entries are never
    materialised. This needs a loss that is the unweighted divergence; `of_weighted`: the problems have weights.
    """
    if config.token_clip is not None and mismatch is not None:
        return {"clip_fraction": totals.share_above(config.token_clip)}
    weighted = config.position_halflife is not None or config.importance_clip is not None
    weighted |= of_weighted or config.loss_aggregation != "token"
    plain = config.objective == "distill" and not weighted
    if config.entry_clip is not None and plain and mismatch:
        return {"clip_fraction": 1 - loss / mismatch}
    return {}


def outcome_metrics(outcome: dict[str, float | None]) -> dict[str, float]:
    """Returns the measured ones of probe NLL and grounded score, under their names in the log."""
    names = {"grounded": "grounded_score"}
    return {names.get(name, name): value for name, value in outcome.items() if value is not None}


def policy_signals(
    objective: float, stats: dict[str, float], needs_reward: bool, skipped: bool
) -> dict[str, float | None]:
    """Returns what the policy observes of a step besides the outcome. All values are None if the step was skipped.

    If the objective includes a reward, "loss" is the divergence without clips: the reward is not due to the teacher.
    """
    loss = stats.get("mismatch", objective) if needs_reward else objective
    values = {"loss": loss, "mismatch": stats.get("mismatch"), "confidence": stats["student_confidence"]}
    return dict.fromkeys(values) if skipped else values


def sample_line(tokenizer: Any, problem: Problem, exposed: str, rollout: Rollout, alpha: float) -> dict[str, Any]:
    """Returns one problem of the step, its response, and the part of a reference that the teacher read."""
    return {
        "problem_id": problem.id,
        "problem": problem.text,
        "answer": problem.answer,
        "response": tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
        "truncated": rollout.truncated,
        "alpha": alpha,
        "exposed": exposed,
    }
