"""Makes a worked solution of what data sets write in their solution columns: no thinking, no marks for a machine."""

from __future__ import annotations

import re

from atesd.data.thinking import without_thinking

__all__ = ["solution_text"]

# GSM8K writes what a calculator would say into its solutions: "3 + 4 = <<3+4=7>>7".
_CALCULATOR = re.compile(r"<<[\d\s.,+\-*/xX()%$]*=[\d\s.,+\-*/xX()%$=]*>>")
_SOLUTION_MARKS = re.compile(r"(?<!\s)\s*<\|(?:begin|end)_of_solution\|>\s*")  # OpenThoughts


def solution_text(text: str) -> str:
    """Returns a solution without its thinking, and without GSM8K's and OpenThoughts' marks.

    >>> solution_text("<think>3 + 4?</think>She has 3 + 4 = <<3+4=7>>7.")
    'She has 3 + 4 = 7.'
    """
    text = _CALCULATOR.sub("", without_thinking(text))
    return _SOLUTION_MARKS.sub("\n", text).strip() if "_of_solution|>" in text else text
