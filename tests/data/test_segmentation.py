"""Segmentation: nothing is lost, nothing is cut in two that belongs together, and the answer is found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd.data.latex_spans import protected_spans
from atesd.data.segmentation import Reference, segment, split_reference

# Text made of what solutions are made of, so that the properties are tried where they can fail.
PIECES = st.sampled_from(
    [
        "Then ",
        "x = 3.5. ",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        ". ",
        "\n",
        "\n\n",
        "Step 1: ",
        "Step 2: ",
        "1. ",
        "2. ",
    ]
    + [
        "\\boxed{",
        "}",
        "{",
        "#### ",
        "7",
        "e.g. ",
        "Dr. ",
        "\\begin{align}",
        "\\end{align}",
        "```",
        "  - ",
        "。",
        "\\",
        "?",
    ]
)
SOLUTIONS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))


@settings(deadline=None)
@given(SOLUTIONS)
def test_joining_the_segments_gives_the_solution_back(solution):
    pieces = segment(solution)
    assert "".join(pieces) == solution
    assert all(pieces)
    assert not solution.strip() or all(piece.strip() for piece in pieces)


@settings(deadline=None)
@given(SOLUTIONS)
def test_joining_segments_and_tail_gives_the_solution_back(solution):
    assert split_reference(solution, "42").solution == solution


@settings(deadline=None)
@given(SOLUTIONS)
def test_no_cut_falls_inside_a_protected_span(solution):
    cut, cuts = 0, set()
    for piece in segment(solution):
        cut += len(piece)
        cuts.add(cut)
    assert not any(start < cut < end for start, end in protected_spans(solution) for cut in cuts)


@settings(deadline=None)
@given(st.lists(st.sampled_from([r"$a. B$", r"\(a. B\)", r"\[a. B\]", r"$$a. B\n\nC$$"]), min_size=1, max_size=6))
def test_formulas_are_never_split(formulas):
    text = "Note. " + " Then. Also. ".join(f.replace("\\n", "\n") for f in formulas) + " End."
    pieces = segment(text)
    assert all(sum(f.replace("\\n", "\n") in piece for piece in pieces) >= 1 for f in formulas)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step 1: add.\nIt is 5. Good.\nStep 2: halve.", ["Step 1: add.\nIt is 5. Good.\n", "Step 2: halve."]),
        ("**Step 1:** a\n**Step 2:** b", ["**Step 1:** a\n", "**Step 2:** b"]),
        ("### Step 1\na\n### Step 2\nb", ["### Step 1\na\n", "### Step 2\nb"]),
        ("Plan:\n1. Add. Yes.\n2. Halve.", ["Plan:\n", "1. Add. Yes.\n", "2. Halve."]),
        ("1) a\n   1) inner\n   2) inner\n2) b", ["1) a\n   1) inner\n   2) inner\n", "2) b"]),
        ("One. Two.\n\nThree.\n \nFour.", ["One. Two.\n\n", "Three.\n \n", "Four."]),
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ("a = 3*5 = 15\nb = 15+1 = 16", ["a = 3*5 = 15\n", "b = 15+1 = 16"]),
        ("这是一句。答案是五。", ["这是一句。", "答案是五。"]),
        ("12. of them left\n13. of them stayed", ["12. of them left\n", "13. of them stayed"]),
    ],
)
def test_steps_come_before_paragraphs_and_paragraphs_before_sentences(text, expected):
    assert segment(text) == expected


@pytest.mark.parametrize(
    "whole",
    [
        "She pays 1,000.50 dollars for 3.5 kilograms.",
        "Some numbers, e.g. Fermat primes, i.e. $F_n$, are odd.",
        "By Dr. Smith and Mr. Jones, cf. Fig. 3, it holds.",
        "By George W. Bush the bill was signed.",
        "It weighs 5 lb. 3 oz. 2 grains in all.",
        "It is no. 7 of them.",
        "Where $x = 1. Y = 2$ holds.",
        "Where \\(x = 1. Y = 2\\) holds.",
        "Where\n\\[ x = 1. \\qquad Y = 2 \\]\nholds.",
        "Where\n\\begin{align*}\nx &= 1. \\\\\n\nY &= \\text{Two. Three.}\n\\end{align*}\nholds.",
        "```\nprint(1). Then\n\nprint(2)\n```",
        "The first line of this sentence is long enough to wrap and\nthe second goes on.",
    ],
)
def test_this_text_is_one_piece(whole):
    assert segment(whole) == [whole]


def test_money_is_not_mathematics():
    text = "The loan is $400,000 x 8/100 = $32,000.\nThe fee is $56,000 x 14/100.\nSo it costs $5. Then $6 more."
    assert protected_spans(text) == []
    assert len(segment(text)) == 4
    mixed = "Take $5x$ and $7$ apples."
    assert [mixed[start:end] for start, end in protected_spans(mixed)] == ["$5x$", "$7$"]


def test_the_column_wins_over_the_solution_and_is_unwrapped():
    assert split_reference("a\n#### 8.0", "8").answer == "8"
    assert split_reference("a\n#### 8.0", r"It is \boxed{9}").answer == "9"
    assert split_reference("a\n#### 8.0", "  ").answer == "8.0"


def test_the_marker_line_is_the_tail():
    expected = Reference(("2 + 3 = 5.\n", "Twice that is 10.\n"), "10", "#### 10\n")
    assert split_reference("2 + 3 = 5.\nTwice that is 10.\n#### 10\n", None) == expected


def test_the_last_sentence_is_the_tail_if_it_holds_the_last_box():
    reference = split_reference("We add. Then we halve.\n\nSo $x = 3. 5$ fits. It is $\\boxed{7}$.", None)
    assert reference.tail == "It is $\\boxed{7}$."
    assert reference.segments == ("We add. Then we halve.\n\n", "So $x = 3. 5$ fits. ")


def test_a_box_that_working_follows_is_working():
    reference = split_reference("It is $\\boxed{7}$. To check, add. It fits.", None)
    assert (reference.tail, len(reference.segments)) == ("", 3)


def test_thinking_is_no_part_of_a_reference():
    thought = "<think>\nPerhaps \\boxed{3}? No.\n</think>\n\n"
    solution = "We add. Then we halve. It is $\\boxed{7}$."
    assert split_reference(thought + solution, None) == split_reference(solution, None)
    assert split_reference("hm</think>It is seven.", "7").solution == "It is seven."
    with pytest.raises(ValueError, match="no final answer"):
        split_reference("<think>Perhaps \\boxed{3}", None)


@pytest.mark.parametrize("answer", ["notfound", "N/A", " Proof. ", r"\boxed{\text{n/a}}"])
def test_an_answer_that_says_there_is_none_is_no_answer_whatever_the_solution_boxes(answer):
    with pytest.raises(ValueError, match="no final answer"):
        split_reference("We add. It is $\\boxed{7}$.", answer)


def test_a_solution_without_any_answer_is_refused_with_its_end():
    with pytest.raises(ValueError, match=r"solution ends in 'I give up\.'.*boxed"):
        split_reference("I give up.", None)
