r"""Splits a reference solution into segments of working, a final answer and a tail.

``reading/context.py`` decides how many of the segments a teacher reads. The paper defines the reference as segments
r_1..r_m and an answer. How to find them is our choice:

1. The *tail* is the end of the solution that states the answer: a last line ``#### N``, or else the last sentence if it
   holds the last ``\boxed{}``. The tail does not count in m, and only alpha = 1 exposes it. The answer itself is always
   shown, see ``prompts.py``. ``"".join(segments) + tail`` equals the solution exactly.
2. The text before the tail is the working. It is split at the coarsest structure that gives at least two segments:
   steps ("Step 1:", numbered lists), else paragraphs (blank lines), else sentences and lines.

White space between two segments belongs to the first. ``sentences.py`` says where no cut falls. Thinking (a ``<think>``
block) is no part of a reference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from atesd.data.answers import column_answer, final_answer, marker_line
from atesd.data.latex_spans import last_boxed, protected_spans
from atesd.data.sentences import cut, line_start, sentence_cuts
from atesd.data.solutions import solution_text
from atesd.errors import DataError

__all__ = ["Reference", "segment", "split_reference"]

# "Step 3:", "**Step 3.**", "### Step 3 - title"
_STEP = re.compile(r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*|__)?(?:Step|STEP)[ \t]+\d+[ \t]*(?:[:.)\-–—*]|$)", re.MULTILINE)
# "1. ", "1) ", "(1) ", "**1.** ", "### 1. "
_NUMBERED = re.compile(r"^([ \t]*)(?:#{1,6}[ \t]*)?(?:\*\*)?\(?(\d{1,2})[.)](?:\*\*)?[ \t]+(?=\S)", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Reference:
    """A split solution: ``segments`` of working, the ``answer``, and the ``tail`` that states the answer.

    ``tail`` is empty if the solution does not end by stating its answer. ``solution`` is the original text,
    without thinking. ``order`` holds the segments' numbers in the order in which exposure adds them; empty: leading
    ones first.
    """

    segments: tuple[str, ...]
    answer: str
    tail: str = ""
    order: tuple[int, ...] = field(default=(), repr=False)

    @property
    def solution(self) -> str:
        return "".join(self.segments) + self.tail


def segment(solution: str) -> list[str]:
    r"""Splits ``solution`` into steps, else paragraphs, else sentences. ``"".join(segment(s)) == s`` for every s.

    >>> segment("Step 1: add.\n2 + 3 = 5.\nStep 2: double it.")
    ['Step 1: add.\n2 + 3 = 5.\n', 'Step 2: double it.']
    >>> segment("She pays 1,000.50 dollars, e.g. in cash. Then $x = 2. 5$ is left.")
    ['She pays 1,000.50 dollars, e.g. in cash. ', 'Then $x = 2. 5$ is left.']
    """
    spans = protected_spans(solution)
    for find_cuts in (_step_cuts, _paragraph_cuts, sentence_cuts):
        pieces = cut(solution, find_cuts(solution), spans)
        if len(pieces) >= 2:
            return pieces
    return [solution] if solution else []


def split_reference(solution: str, answer: str | None) -> Reference:
    r"""Splits ``solution`` into segments of working, the final answer and the tail.

    ``answer`` (the dataset's column) overrides the answer in the solution, without its ``\boxed{}`` or ``####``.

    >>> split_reference("2 + 3 = 5.\nTwice that is 10.\n#### 10", None)
    Reference(segments=('2 + 3 = 5.\n', 'Twice that is 10.\n'), answer='10', tail='#### 10')

    Raises DataError if there is no answer: neither the column nor the solution has one, or it says so ("N/A", "proof").
    """
    solution = solution_text(solution)
    found = column_answer(answer) if answer and answer.strip() else column_answer(final_answer(solution))
    if not found:
        raise DataError(
            f"no final answer: the answer column is {answer!r} and the solution ends in {solution[-60:]!r}; "
            "give an answer column, or end the solution with \\boxed{...} or '#### ...'"
        )
    start = _tail_start(solution)
    return Reference(segments=tuple(segment(solution[:start])), answer=found, tail=solution[start:])


def _tail_start(solution: str) -> int:
    """Returns the start of the tail, or ``len(solution)`` if the solution does not end by stating its answer."""
    marker = marker_line(solution)
    if marker is not None and "\n" not in solution[marker:].strip():
        return marker
    box = last_boxed(solution)
    if box is None:
        return len(solution)
    sentences = cut(solution, sentence_cuts(solution), protected_spans(solution))
    start = len(solution) - len(sentences[-1])
    return start if start <= box[0] else len(solution)


def _step_cuts(text: str) -> list[int]:
    """Returns line starts of "Step n" headings, else of the items of the outermost numbered list (1, 2, 3)."""
    steps = [m.start() for m in _STEP.finditer(text)]
    if len(steps) >= 2:
        return steps
    items = list(_NUMBERED.finditer(text))
    indent = min((len(m.group(1)) for m in items), default=0)
    cuts, previous = [], None
    for item in items:
        number = int(item.group(2))
        # A list starts at 0 or 1 and counts up. Any other number at the start of a line is not an item.
        if len(item.group(1)) == indent and (number <= 1 or (previous is not None and number == previous + 1)):
            cuts.append(item.start())
            previous = number
    return cuts if len(cuts) >= 2 else []


def _paragraph_cuts(text: str) -> list[int]:
    return [line_start(text, m.start(), m.end()) for m in _BLANK_LINE.finditer(text)]
