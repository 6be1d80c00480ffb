r"""Gives a reference a wrong final answer: a control that asks whether a teacher helps because its reference is right.

The wrong answer takes the right one's place everywhere: in the working, in the line that states it, and as the answer
that the prompt gives. How is our choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from atesd.data.answers import final_answer
from atesd.data.segmentation import Reference
from atesd.errors import DataError

__all__ = ["with_answer", "wrong_answer"]

_INTEGER = re.compile(r"[-+]?\d+")
_FIRST_NUMBER = re.compile(r"\d+")


def wrong_answer(right: str, others: Iterable[str]) -> str:
    r"""Returns the first of `others` that differs from `right`; if there is none, `right` with its number raised by 1.

    >>> wrong_answer("7", ["7", " 7.0", "12"]), wrong_answer(r"\frac{1}{2}", [r"\frac{1}{2}"])
    ('12', '\\frac{2}{2}')

    Raises DataError for an answer without a number that no other answer differs from.
    """
    for other in others:
        if _plain(other) != _plain(right):
            return other.strip()
    if not _FIRST_NUMBER.search(right):
        raise DataError(f"no wrong answer in the place of {right!r}: no problem has another, and it has no number")
    return _FIRST_NUMBER.sub(lambda number: str(int(number[0]) + 1), right, count=1)


def with_answer(reference: Reference, wrong: str) -> Reference:
    r"""Returns `reference` with `wrong` in the place of its answer, in as many segments.

    >>> with_answer(Reference(("3 + 4 = 7.\n", "Not 17 or 7.5.\n"), "7", "#### 7"), "9")
    Reference(segments=('3 + 4 = 9.\n', 'Not 17 or 7.5.\n'), answer='9', tail='#### 9')
    """
    spellings = {reference.answer, final_answer(reference.solution) or reference.answer}
    spellings |= {f"{int(text):,}" for text in spellings if _INTEGER.fullmatch(text)}
    # The longest first: it may hold another. Not inside a longer number or word.
    any_of = "|".join(re.escape(text) for text in sorted(spellings, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w\\])(?<!\d[.,])(?:{any_of})(?![\w]|[.,]\d)")
    *segments, stated = (pattern.sub(lambda _: wrong, text) for text in (*reference.segments, reference.tail))
    if stated.strip() and wrong not in stated:  # it spells its answer in another way
        stated = f"Final answer: \\boxed{{{wrong}}}"
    return replace(reference, segments=tuple(segments), answer=wrong, tail=stated)


def _plain(answer: str) -> str | float:
    """The answer as a number where it is one, so that 7 and 7.0 are one answer."""
    text = "".join(answer.split()).casefold()
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
