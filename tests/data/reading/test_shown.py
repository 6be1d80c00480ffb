"""What the teacher is shown: whose reference, with which answer, in which order."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.data.problems import Problem
from atesd.data.reading.context import exposed_segments, exposed_text
from atesd.data.reading.shown import ShownReferences
from atesd.data.reading.wrong_answers import with_answer, wrong_answer
from atesd.data.segmentation import Reference, split_reference
from atesd.errors import DataError

TRAIN = [
    Problem(
        f"p{n}",
        f"What is {n} and 1, doubled?",
        f"{n} + 1 = {n + 1}.\n\nTwice that is {2 * n + 2}.\n\n#### {2 * n + 2}",
        str(2 * n + 2),
    )
    for n in range(10, 30)
]
HELD_OUT = Problem("h", "What is 3 and 1, doubled?", "3 + 1 = 4.\n\nTwice that is 8.\n\n#### 8", "8")


def own(problem):
    return split_reference(problem.solution, problem.answer)


def test_by_default_the_teacher_reads_the_problem_s_own_reference():
    shown = ShownReferences(TRAIN)
    assert [shown.of(p) for p in (*TRAIN, HELD_OUT)] == [own(p) for p in (*TRAIN, HELD_OUT)]


@given(seed=st.integers(0, 10_000), count=st.integers(2, 20))
def test_another_problem_s_reference_is_never_the_own_one_and_each_is_shown_once(seed, count):
    shown = ShownReferences(TRAIN[:count], source="other_problem", seed=seed)
    references = [shown.of(p) for p in TRAIN[:count]]
    assert all(reference != own(p) for reference, p in zip(references, TRAIN, strict=False))
    assert sorted(r.solution for r in references) == sorted(p.solution for p in TRAIN[:count])
    again = ShownReferences(TRAIN[:count], source="other_problem", seed=seed)
    assert [again.of(p) for p in TRAIN[:count]] == references
    assert shown.of(HELD_OUT) in references


def test_another_problem_s_answer_comes_with_its_reference():
    shown = ShownReferences(TRAIN, source="other_problem")
    for problem in TRAIN:
        reference = shown.of(problem)
        assert reference.answer != problem.answer
        assert reference.solution.endswith(f"#### {reference.answer}")


def test_one_problem_has_no_other():
    with pytest.raises(DataError, match="other_problem"):
        ShownReferences(TRAIN[:1], source="other_problem")


def test_a_wrong_answer_stands_wherever_the_right_one_stood():
    shown = ShownReferences(TRAIN, source="wrong_answer")
    for problem in (*TRAIN, HELD_OUT):
        reference = shown.of(problem)
        assert reference.answer != problem.answer
        assert not re.search(rf"\b{problem.answer}\b", reference.solution)
        assert reference.solution.endswith(f"Twice that is {reference.answer}.\n\n#### {reference.answer}")
        assert len(reference.segments) == len(own(problem).segments)


@pytest.mark.parametrize(
    ("solution", "answer", "wrong", "expected"),
    [
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "3", "So $x = \\boxed{3}$."),
        ("She pays 1,234 dollars. #### 1234", "1234", "77", "She pays 77 dollars. #### 77"),
        ("7 of 17, 7.5 or 3.7 are 7.\n#### 7", "7", "9", "9 of 17, 7.5 or 3.7 are 9.\n#### 9"),
        ("Half: 0.5.\n\nSo $\\boxed{1/2}$.", "0.5", "2", "Half: 2.\n\nSo $\\boxed{2}$."),
        ("It is x_7.\n#### 7", "7", "9", "It is x_7.\n#### 9"),  # part of a name
        ("It is (B).\n\nSo $\\boxed{\\text{(B)}}$.", "B", "D", "It is (D).\n\nSo $\\boxed{D}$."),
    ],
)
def test_an_answer_is_replaced_as_a_word_of_its_own(solution, answer, wrong, expected):
    changed = with_answer(split_reference(solution, answer), wrong)
    assert (changed.solution, changed.answer) == (expected, wrong)


def test_a_tail_that_spells_its_answer_in_another_way_states_the_wrong_one():
    changed = with_answer(Reference(("Halve it.\n",), "0.5", "So it is one half."), "3")
    assert changed.tail == "Final answer: \\boxed{3}"


@pytest.mark.parametrize(
    ("right", "others", "expected"),
    [
        ("7", ["7", "7.0", "12"], "12"),
        ("1,000", ["1000", "1000.0"], "2,000"),  # its first number
        ("yes", ["Yes ", "no"], "no"),
        ("\\frac{3}{4}", [], "\\frac{4}{4}"),
    ],
)
def test_a_wrong_answer_differs_in_value(right, others, expected):
    assert wrong_answer(right, others) == expected


def test_an_answer_that_nothing_differs_from_is_named():
    with pytest.raises(DataError, match="'yes'"):
        wrong_answer("yes", ["Yes"])


def test_no_reference_is_shown_of_any_problem():
    shown = ShownReferences(TRAIN, source="none")
    assert [shown.of(p) for p in (TRAIN[0], HELD_OUT)] == [None, None]
    assert shown.copied(TRAIN[0], own(TRAIN[0]), 1.0) == set()


@pytest.mark.parametrize("order", ["leading", "trailing", "random"])
@given(seed=st.integers(0, 100), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_exposure_shows_all_of_a_smaller_one_in_the_solution_s_order(order, seed, low, high):
    low, high = sorted((low, high))
    problem = Problem("p", "q", "".join(f"Step {n}: do it.\n" for n in range(1, 8)) + "#### 3", "3")
    reference = ShownReferences([problem], order=order, seed=seed).of(problem)
    fewer, more = exposed_segments(reference, low), exposed_segments(reference, high)
    assert set(fewer) <= set(more)
    assert more == sorted(more)
    assert exposed_text(reference, 1.0) == problem.solution
    if order == "leading":
        assert more == list(range(len(more)))
    elif order == "trailing":
        assert more == list(range(7 - len(more), 7))


def test_random_orders_differ_between_problems_and_seeds():
    solution = "".join(f"Step {n}: do it.\n" for n in range(1, 8)) + "#### 3"
    problems = [Problem(f"p{n}", "q", solution, "3") for n in range(5)]
    orders = {ShownReferences(problems, order="random", seed=s).of(p).order for p in problems for s in (0, 1)}
    assert len(orders) > 5


def test_given_segments_are_exposed_in_the_place_of_the_solution_s():
    problem = Problem(
        "p", "q", "Add them: 3.\n\nDouble it: 6.\n\n#### 6", "6", ("Algebra.", "Add, then double.", "Add them: 3.")
    )
    shown = ShownReferences([problem])
    reference = shown.of(problem)
    assert exposed_text(reference, 0.4) == "Algebra.\n\n"
    assert exposed_text(reference, 1.0).split("\n\n") == ["Algebra.", "Add, then double.", "Add them: 3.", ""]
    # what of the solution can be copied: a segment that stands among those exposed
    assert shown.copied(problem, own(problem), 0.7) == set()
    assert shown.copied(problem, own(problem), 1.0) == {0}


def test_only_the_own_reference_can_be_copied():
    problem = TRAIN[0]
    for source, copied in (("own", {0}), ("other_problem", set()), ("wrong_answer", set())):
        assert ShownReferences(TRAIN, source=source).copied(problem, own(problem), 0.5) == copied
    assert ShownReferences(TRAIN, order="trailing").copied(problem, own(problem), 0.5) == {1}
