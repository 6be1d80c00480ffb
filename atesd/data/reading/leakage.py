"""Notices a student that talks about what only its teacher was told.

The teacher's prompt speaks of a reference solution, and asks not to copy it. A student that learns this wording instead
of the working answers with "I will not copy the reference", which no problem asks for.
"""

from __future__ import annotations

import re
from collections.abc import Set

from atesd.data.templates import SLOT, PromptTemplates

__all__ = ["TeacherWording"]

WORDS = 3  # words in a row (our choice)
_WORD = re.compile(r"\w+")


class TeacherWording:
    """The wording of the teacher's templates.

    >>> wording = TeacherWording(PromptTemplates())
    >>> [wording.echoed(text, "What is 3 + 4?") for text in ("I read it, but I do not copy it.", "It is 7.")]
    [True, False]
    """

    def __init__(self, templates: PromptTemplates):
        teacher = (
            templates.teacher,
            templates.teacher_partial,
            templates.teacher_parts,
            templates.teacher_answer_only,
            templates.transition,
        )
        # Slots are borders: what stands on both sides of one was never written in a row. (A slot's name is one word.)
        self.grams = {gram for text in teacher for piece in SLOT.split(text) for gram in grams(piece)}

    def echoed(self, response: str, student_prompt: str, solution: str = "") -> bool:
        """Whether `response` has words of the teacher's templates in a row that `student_prompt` and `solution` lack.

        A student that writes as the problem's own solution does has learned the working, not the wrapper.
        """
        return not (self.grams & grams(response)).issubset(grams(student_prompt) | grams(solution))


def grams(text: str) -> Set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}
