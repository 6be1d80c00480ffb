"""A student that echoes the teacher's wording is noticed, and one that answers is not."""

from __future__ import annotations

import pytest

from atesd.data.reading.leakage import TeacherWording
from atesd.data.templates import PromptTemplates

PROBLEM = "What is 3 + 4?"


@pytest.mark.parametrize(
    "response",
    [
        "I will solve it, and do not copy it.",
        "Here is a reference solution to this problem: 3 + 4 = 7.",
        "THE FINAL ANSWER TO this problem is 7",  # case does not matter
        "now, solve: the problem yourself",  # nor do marks between words
    ],
)
def test_words_of_the_teacher_s_templates_in_a_row_are_an_echo(response):
    assert TeacherWording(PromptTemplates()).echoed(response, PROBLEM)


@pytest.mark.parametrize("response", ["", "It is 7.", "The answer is 7, which is the sum.", "A reference to Gauss."])
def test_an_answer_is_none(response):
    assert not TeacherWording(PromptTemplates()).echoed(response, PROBLEM)


def test_what_the_student_was_told_itself_is_none():
    asked = "Do not copy it. What is 3 + 4?"
    assert not TeacherWording(PromptTemplates()).echoed("I do not copy it.", asked)
    # default templates: both prompts ask to reason step by step
    student = PromptTemplates().student.replace("{problem}", PROBLEM)
    assert not TeacherWording(PromptTemplates()).echoed("I reason step by step, and put it in a box.", student)


def test_the_words_of_the_problem_s_own_solution_are_none():
    wording = TeacherWording(PromptTemplates(teacher_answer_only="{problem}\n\nThe answer is {answer}."))
    assert wording.echoed("The answer is 7.", PROBLEM, "3 + 4 = 7")
    assert not wording.echoed("The answer is 8.", PROBLEM, "3 + 4 = 7\nThe answer is 7.")
    assert wording.echoed("I do not copy it. The answer is 7.", PROBLEM, "The answer is 7.")


def test_texts_on_both_sides_of_a_slot_are_no_row():
    shown = "{problem} x {reference} y {answer}"
    templates = PromptTemplates(
        student="{problem}",
        teacher="{problem} see {reference} here",
        transition="",
        teacher_partial=shown,
        teacher_parts=shown,
        teacher_answer_only="{problem} {answer}",
    )
    assert TeacherWording(templates).grams == set()
