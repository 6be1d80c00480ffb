"""What the teacher reads of a reference: whose it is, and in which order exposure adds its segments.

Only the teacher's prompt depends on it. Reward, evaluation, probe, SFT and the grounded score use the problem's own
solution. The sources are controls: follow-up papers (arXiv 2608.09228, 2609.20612, 2609.25623) found that another
problem's solution, a wrong answer or no reference come close to the own one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from atesd.data.problems import Problem
from atesd.data.reading.context import exposed_segments, exposed_text
from atesd.data.reading.wrong_answers import with_answer, wrong_answer
from atesd.data.segmentation import Reference, split_reference
from atesd.errors import DataError

__all__ = ["ShownReferences"]


class ShownReferences:
    """The reference that the teacher is shown for each problem.

    Args:
        train: the training problems, from which other problems' references and answers come.
        source: `own`; `other_problem`, the reference and answer of another training problem; `wrong_answer`, the own
            one with another problem's answer; `none`.
        order: `leading`, `trailing` or `random` segments first. `random` is one order for each problem: what a smaller
            alpha shows, a larger one shows too.
        seed: of the pairing of problems and of the random orders.

    Raises DataError if there are too few problems to take another's.
    """

    def __init__(self, train: Sequence[Problem], *, source: str = "own", order: str = "leading", seed: int = 0):
        self.source, self.order, self.seed = source, order, seed
        # One cycle through all problems: each is followed by another, never by itself.
        self.cycle = random.Random(f"references-{seed}").sample(list(train), len(train))
        self.place = {problem.id: index for index, problem in enumerate(self.cycle)}
        self.known: dict[str, Reference | None] = {}
        if source == "other_problem" and len(train) < 2:
            raise DataError(f"reference_source is {source!r}, and there is {len(train)} training problem: give more")

    def of(self, problem: Problem) -> Reference | None:
        """Returns what the teacher is shown of, at alpha = 1 all of it; None if it is shown no reference."""
        if problem.id not in self.known:
            found = None if self.source == "none" else self._sourced(problem)
            self.known[problem.id] = None if found is None else self._ordered(problem, found)
        return self.known[problem.id]

    def copied(self, problem: Problem, own: Reference, alpha: float) -> set[int]:
        """Returns the numbers of those segments of the problem's own solution that the teacher can copy at `alpha`."""
        shown = self.of(problem)
        if shown is None or self.source != "own":
            return set()
        if problem.segments is None:
            return set(exposed_segments(shown, alpha))
        text = exposed_text(shown, alpha)
        return {number for number, piece in enumerate(own.segments) if piece.strip() in text}

    def _others(self, problem: Problem) -> Iterator[Problem]:
        """Yields the training problems after `problem` in the cycle. A held-out problem has a place of its own."""
        start, n = self.place.get(problem.id), len(self.cycle)
        if start is None:
            start = random.Random(f"{self.seed}-{problem.id}").randrange(n) - 1
            n += 1  # the one before its place comes last
        return (self.cycle[(start + step) % len(self.cycle)] for step in range(1, n))

    def _sourced(self, problem: Problem) -> Reference:
        if self.source == "other_problem":
            return teacher_reference(next(self._others(problem)))
        own = teacher_reference(problem)
        if self.source == "wrong_answer":
            return with_answer(own, wrong_answer(own.answer, (other.answer for other in self._others(problem))))
        return own

    def _ordered(self, problem: Problem, reference: Reference) -> Reference:
        numbers = list(range(len(reference.segments)))
        if self.order == "trailing":
            numbers.reverse()
        elif self.order == "random":
            random.Random(f"{self.seed}-{problem.id}").shuffle(numbers)
        else:
            return reference
        return replace(reference, order=tuple(numbers))


def teacher_reference(problem: Problem) -> Reference:
    """The problem's reference: its solution, split, or the segments that its data give."""
    if problem.segments is None:
        return split_reference(problem.solution, problem.answer)
    pieces = tuple(piece.rstrip() + "\n\n" for piece in problem.segments)
    return Reference(pieces, problem.answer, order=tuple(range(len(pieces))))
