"""Groups samples with equivalent answers into votes, which maj@k counts.

This needs the grader, unlike statistics.py: it decides that \\frac12 and 0.5 are the same vote.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from atesd.evaluation.grading.answer_text import same_answer
from atesd.evaluation.grading.grader import Grader

LONGEST_COMPARED = 200  # characters; longer answers are equal only if their text is
NOT_COMPARED = ("time limit", "memory limit", "the grading process died")  # each comparison would hit the limit again


def votes(problems: Sequence[Sequence[dict[str, Any]]], grader: Grader) -> list[list[Hashable | None]]:
    """Returns the vote of each sample of each problem: equal for equivalent answers, None without an answer.

    Args:
        problems: the samples of each problem, with `extracted`, `correct` and `reason`. Correct samples are not
            compared, since `majority_vote` counts them as one answer.
        grader: compares answers whose text alone does not decide.
    """
    leaders: list[dict[str, str]] = [{} for _ in problems]
    asked: list[tuple[int, str, str]] = []
    for leader, (index, samples) in zip(leaders, enumerate(problems), strict=True):
        for answer in dict.fromkeys(s["extracted"] for s in samples if comparable(s)):
            same = next((first for first in leader if leader[first] == first and same_answer(first, answer)), None)
            if same is None:
                asked += [(index, first, answer) for first in leader if leader[first] == first]
            leader[answer] = same or answer
    asked = [(index, first, answer) for index, first, answer in asked if same_answer(first, answer) is None]
    verdicts = grader.grade_many([f"\\boxed{{{answer}}}" for _, _, answer in asked], [first for _, first, _ in asked])
    for (index, first, answer), verdict in zip(asked, verdicts, strict=True):
        if verdict.correct:
            leaders[index][answer] = voted(leaders[index], first)
    return [
        [voted(leader, sample["extracted"]) for sample in samples]
        for leader, samples in zip(leaders, problems, strict=True)
    ]


def comparable(sample: dict[str, Any]) -> bool:
    answer = sample["extracted"]
    wrong = answer is not None and not sample["correct"]
    return wrong and len(answer) <= LONGEST_COMPARED and sample["reason"] not in NOT_COMPARED


def voted(leader: dict[str, str], answer: str | None) -> str | None:
    """Returns the representative of the answers equivalent to `answer`."""
    while answer is not None and leader.get(answer, answer) != answer:
        answer = leader[answer]
    return answer
