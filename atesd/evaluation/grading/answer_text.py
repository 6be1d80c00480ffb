r"""Compares answers as text and as plain numbers, before any computer algebra.

Most answers ("42", "\text{Monday}", "1,000") need no algebra. These rules are fast, exact and safe on any input.
``grader.py`` sends what they cannot decide to math-verify in another process.
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["clean", "plain_number", "same_answer"]

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_MARKS = re.compile(r"(?<!\\)\\(?:[!,;: ()\[\]]|(?:left|right)(?![a-z])|displaystyle|quad)|~")
_NO_WIDTH = (r"\!", r"\left", r"\right")
_MONEY = re.compile(r"\\?[$£€¥]")
_TEXT_NUMBER_UNIT = re.compile(r"\\text\s*\{\s*([-+]?[\d.,]+)\s+[A-Za-z][A-Za-z ]*\}")
_GROUPED = re.compile(r"([-+]?\d{1,3})((?:(?:,|\{,\}|\\[,!;: ]|~| )\d{3})+)(\.\d+)?")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_WORDS = re.compile(r"[^\W\d_]{3,}(?: [^\W\d_]+)*")
_CLOSE = Fraction(1, 10**9)  # relative difference below which two decimals differ by floating-point noise only


def clean(answer: str) -> str:
    r"""Removes dollar signs, spacing commands, digit grouping and a final full stop from an answer.

    >>> clean(r"\$1{,}000.50."), clean(r"\text{6 hours}"), clean(r"$\left(1, 2\right)$")
    ('1000.50', '6', '(1, 2)')
    """
    answer = _MONEY.sub("", answer).strip()
    answer = _TEXT_NUMBER_UNIT.sub(r"\1", answer)
    if len(answer) > 1 and answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip()
    grouped = _GROUPED.fullmatch(answer)
    if grouped:
        return grouped[1] + re.sub(r"\D", "", grouped[2]) + (grouped[3] or "")
    return " ".join(_MARKS.sub(lambda mark: "" if mark[0] in _NO_WIDTH else " ", answer).split())


def plain_number(answer: str) -> Fraction | None:
    """Returns the exact value of a cleaned answer that is an integer or decimal (e.g. ``1e3``), else ``None``."""
    number = answer.replace("+", "", 1) if answer.startswith("+") else answer
    return Fraction(number) if len(number) <= 200 and _NUMBER.fullmatch(number) else None


def same_answer(gold: str, target: str) -> bool | None:
    r"""Returns whether two answers are equal, or ``None`` if text and plain numbers do not decide.

    >>> same_answer("1,000", "1000.0"), same_answer(r"\text{Even}", "even"), same_answer("odd", "even")
    (True, True, False)
    >>> same_answer(r"\frac12", "0.5") is None
    True
    """
    gold, target = clean(gold), clean(target)
    if gold == target:
        return True
    numbers = plain_number(gold), plain_number(target)
    if numbers[0] is not None and numbers[1] is not None:
        if all(number.denominator == 1 for number in numbers):
            return numbers[0] == numbers[1]
        return abs(numbers[0] - numbers[1]) <= _CLOSE * max(abs(numbers[0]), abs(numbers[1]))
    words = _as_words(gold), _as_words(target)
    if words[0] == words[1] and words[0]:
        return True
    # Do not pass words on: algebra reads a word as a product of letters, so "on" would equal "no".
    return False if all(_WORDS.fullmatch(word) for word in words) else None


def _as_words(answer: str) -> str:
    """Removes LaTeX text wrappers, brackets around a choice, case and extra spaces: "(\\text{C})" becomes "c"."""
    unwrapped = _WRAPPER.sub(r"\1", answer).strip()
    choice = re.fullmatch(r"\(?([A-Za-z])\)?", unwrapped)
    return " ".join((choice[1] if choice else unwrapped).casefold().split())
