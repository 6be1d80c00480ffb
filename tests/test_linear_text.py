"""Hostile text is read in time linear in its length.

Growth is measured, not seconds: four times the text may take about four times the processor's time. Where each
character looks at all others, it takes sixteen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest

from atesd.data.answers import final_answer
from atesd.data.latex_spans import last_boxed, protected_spans
from atesd.data.segmentation import segment, split_reference
from atesd.data.solutions import solution_text
from atesd.evaluation.grading.answer_text import same_answer

LENGTH = 8_000  # characters of the shorter text
GROWTH = 8.0  # halfway, by ratio, between 4 and 16
LEAST_ROUNDS, MOST_ROUNDS = 3, 12  # another process can slow a round, and none can speed one up


def growth(function: Callable[[str], object], text: Callable[[int], str]) -> float:
    """How many times as long the least of several runs takes on a text four times as long."""
    texts = text(LENGTH), text(4 * LENGTH)
    least = [math.inf, math.inf]
    for done in range(MOST_ROUNDS):
        for i, each in enumerate(texts):
            started = time.process_time()
            function(each)
            least[i] = min(least[i], time.process_time() - started)
        if done + 1 >= LEAST_ROUNDS and least[1] <= GROWTH * least[0]:
            break
    return least[1] / max(least[0], 1e-4)  # shorter times are the clock's


def repeated(piece: str) -> Callable[[int], str]:
    return lambda n: piece * (n // len(piece))


def numbered(*pieces: str) -> Callable[[int], str]:
    """Each piece many times over, every time with another number."""
    return lambda n: "".join("".join(p % i for i in range(n // (16 * len(pieces)))) for p in pieces)


TEXTS = {
    **{
        piece: repeated(piece)
        for piece in (
            *(
                "\\boxed{",
                "\\boxed{1}",
                "\\boxed ",
                "\\boxed",
                "{",
                "}",
                "$",
                "$$",
                "$a ",
                "$1 ",
                "$ \n\n",
                "\\$",
                "\\\\$",
            ),
            *("\\(", "\\[", "\\", "```", "```a ", "\\begin{a}", "\\end{a}", "\\begin{", "\\begin ", "\\text{1 "),
            *(
                "#### x\n",
                "#### 1\n",
                "#",
                "1. ",
                "1. a\n",
                "Step 1:\n",
                "\n",
                "\n \n",
                "\t",
                ". A",
                ".)",
                "。",
                "a.",
                "x",
            ),
        )
    },
    "spaces": lambda n: "a" + " " * n + "b",
    "spaces after a stop": lambda n: "a." + " " * n + "b",
    "spaces in a command": lambda n: "\\begin" + " " * n + "{a}",
    "runs of spaces": repeated(" " * 400 + "x"),
    "lines of spaces": repeated("\n" + " " * 400),
    "spaces before a number": lambda n: " " * n + "1.",
    "a marker and spaces": lambda n: "#### 1" + " " * n + "x",
    "a marker and commas": lambda n: "#### 1" + "," * n + "x",
    "environments without end": numbered("\\begin{a%d}"),
    "environments without begin": numbered("\\end{a%d}"),
    "environments across": numbered("\\begin{a%d}", "\\end{a%d}"),
    "environments in a row": lambda n: "".join(f"\\begin{{a{i}}}\\end{{a{i}}}" for i in range(n // 24)),
    "escaped dollars": lambda n: "$" + "\\$" * (n // 2),
    "line breaks before dollars, then a blank line": lambda n: "\\\\$" * (n // 3) + "\n\n$",
    "line breaks before money, then a line": lambda n: "\\\\$1" * (n // 4) + "\n$",
    "a formula without end": lambda n: "$a" + " b" * (n // 2),
    "closing marks": lambda n: "." + ")" * n + "x",
    "nested boxes": lambda n: "\\boxed{" * (n // 8) + "1" + "}" * (n // 8),
    "a word between boxes": lambda n: "\\boxed{1}" + "x" * n + "\\boxed{2}",
    "bullets with boxes": repeated("- \\boxed{1}\n - \\boxed{2}\n"),
    "labels with boxes": repeated("(a) \\boxed{1}. (b) \\boxed{2}. Part 3 \\boxed{3}\n\n"),
    "numbers with boxes": lambda n: "".join(f"{i % 100}. \\boxed{{{i}}}\n" for i in range(n // 15)),
    "bullets and spaces": lambda n: "\\boxed{1}\n- " + " " * n + "\n\\boxed{2}",
    "spaces after a mark": lambda n: "<|end_of_solution|>x" + " " * n + "y",
    "spaces in a unit": lambda n: "\\boxed{\\text{1" + " " * n + "!}}",
}
READERS = {
    "spans": protected_spans,
    "boxes": last_boxed,
    "segments": segment,
    "reference": lambda text: split_reference(text, "1"),
    "answer": final_answer,
    "solution": solution_text,
    "comparison": lambda text: same_answer("12", text.removeprefix("\\boxed{").removesuffix("}")),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_time_grows_as_the_text_does(text):
    slow = {name: round(ratio, 1) for name, read in READERS.items() if (ratio := growth(read, text)) > GROWTH}
    assert not slow


def test_the_measure_tells_a_quadratic_reader_from_a_linear_one():
    assert growth(lambda text: [text.count("b") for _ in range(len(text) // 8)], repeated("a")) > GROWTH
    assert growth(lambda text: [text[i] for i in range(len(text))], repeated("a")) < GROWTH
