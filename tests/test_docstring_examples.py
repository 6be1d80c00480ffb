"""The examples in the docstrings of these modules say what the code does."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "config.doors",
        "data.reading.context",
        "data.latex_spans",
        "data.segmentation",
        "data.templates",
        "errors",
        "evaluation.grading.answer_text",
        "evaluation.grading.grader",
        "exposure.policies",
        "integrations.trl",
        "rollout.engine",
    ],
)
def test_the_examples_in_the_docstrings_are_true(name):
    if name == "evaluation.grading.grader":
        pytest.importorskip("math_verify", reason="grading needs math-verify")
    result = doctest.testmod(importlib.import_module(f"atesd.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
