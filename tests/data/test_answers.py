"""Answers: which box counts, what several boxes mean, and what says that there is no answer."""

import pytest

from atesd.data.answers import boxed_answer, column_answer, final_answer, response_answer
from atesd.data.latex_spans import last_boxed
from atesd.data.thinking import decode_response, opens_thinking, without_thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"It is \boxed{3}. No, it is \boxed{4}.", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{4}, as asked in \boxed{}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert final_answer(text) == boxed_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{4} and \boxed{5",
        r"So \boxed{12}. Wait, I mean \boxed{\frac{3}{",
        r"First \fbox{1}, then \fbox{2",
        r"It is \boxed{4}. So the answer is \boxed",
        "\\boxed{4}. Then \\boxed{5\n#### 4",
    ],
)
def test_a_box_that_is_cut_off_after_the_last_closed_one_means_no_answer(text):
    assert final_answer(text) is None and boxed_answer(text) is None and column_answer(text) == ""


def test_an_early_box_whose_brace_is_missing_does_not_hide_the_last_one():
    assert final_answer(r"Say \boxed{\frac{1}{2}. In full: it is \boxed{0.5}.") == "0.5"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The area is \fbox{9}.", "9"),
        (r"It is $\boxed5$.", "5"),
        (r"It is $\boxed 5$.", "5"),
        (r"It is \(\boxed 12.5\), at last.", "12.5"),
        (r"\boxed{1} was wrong. It is \boxed -3.", "-3"),
        (r"It is $\boxed\frac{\sqrt{2}}{2}$", r"\frac{\sqrt{2}}{2}"),
        (r"It is $\fbox 1{,}000$", "1"),
        (r"It is \boxed{3}, in a \boxed environment.", "3"),
        (r"It is \boxed{3}, written with `\boxed`.", "3"),
        (r"\boxedfoo 4", None),
    ],
)
def test_boxes_without_a_brace_and_framed_boxes_count_and_words_about_boxes_do_not(text, answer):
    assert final_answer(text) == boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$x=\boxed{2}$ or $x=\boxed{-2}$.", "2, -2"),
        (r"The point has $a = \boxed{1}$, $b_1 = \boxed{2}$ and $c = \boxed{3}$. Both hold.", "1, 2, 3"),
        (r"\[ p = \boxed{3}, \quad q = \boxed{\tfrac12} \]", r"3, \tfrac12"),
        (r"So it is \boxed{6}, and again \boxed{6}.", "6"),
        (r"One root is \boxed{1}. The other is \boxed{4}.", "4"),
        (r"It is $\boxed{\frac12} = \boxed{0.5}$.", None),
        (r"There are \boxed{3} pairs, so it is \boxed{6}.", None),
        (r"It is \boxed{\pi}, which is about \boxed{3.14}.", None),
    ],
)
def test_several_boxes_in_the_final_sentence_are_parts_or_no_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Two parts.\n\n- The first is $\\boxed{2}$.\n- The second is $\\boxed{5}$.", "2, 5"),
        ("* **Sum:** \\boxed{3}\n\n* **Product:** \\boxed{2}\n\nBoth are positive.", "3, 2"),
        ("**Part (a).** We find $\\boxed{3}$.\n\n**Part (b).** Work.\n\nHence $\\boxed{9}$.", "3, 9"),
        ("(a) Find x. (b) Find y.\n\n(a) It is $\\boxed{3}$.\n\n(b) By (a), it is $\\boxed{4}$.", "3, 4"),
        ("(i) Trivial.\n(ii) It is \\boxed{5}.\n(iii) It is \\boxed{6}.", "5, 6"),
        ("Part 1: \\boxed{1}\n\nPart 2: \\boxed{2}", "1, 2"),
        ("\\begin{itemize}\n\\item $\\boxed{2}$\n\\item $\\boxed{3}$\n\\end{itemize}", "2, 3"),
        ("- first:\n  - \\boxed{1}\n  - as said\n- second:\n  - \\boxed{2}", "1, 2"),
        ("1. $x = \\boxed{2}$.\n2. $y = \\boxed{5}$.", None),  # parts or steps
        ("(a) $x = \\boxed{1}$ and $y = \\boxed{2}$.\n(b) It is \\boxed{5}.", None),
        ("(a) It is \\boxed{3}.\n\n(b) It is \\boxed{4}.\n\nThe total is \\boxed{7}.", None),
    ],
)
def test_boxes_in_the_items_of_a_final_list_are_parts_or_no_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "Step 1: add. We get \\boxed{5}.\n\nStep 2: double. So it is \\boxed{10}.",
        "1. Add: $2 + 3 = \\boxed{5}$.\n2. Double it.\n3. So it is $\\boxed{10}$.",
        "1. Add: $\\boxed{5}$.\n2. Double: $\\boxed{12}$.\n\nThe answer is $\\boxed{10}$.",
        "- If $n$ is even, $\\boxed{4}$.\n- If $n$ is odd, $\\boxed{6}$.\n\nIn total $\\boxed{10}$.",
        "- a sum of \\boxed{3}\n- a product of \\boxed{2}\nThus \\boxed{10}.",
        "\\begin{enumerate}\n\\item $\\boxed{2}$\n\\item $\\boxed{3}$\n\\end{enumerate}\nThe sum is \\boxed{10}.",
        "(a) Trivial.\n(b) It is \\boxed{10}.",
        "(A) 5 (B) 10 (C) 15. By (A) and (B), \\boxed{5} is too small. It is \\boxed{10}.",
        "Case (a) gives \\boxed{1}. Case (b) gives \\boxed{10}.",
        "- \\boxed{10} by the first way\n- \\boxed{10} by the second",
    ],
)
def test_boxes_on_the_way_to_the_answer_are_no_parts(text):
    assert final_answer(text) == "10"


def test_a_response_that_lists_boxes_is_parts_only_where_the_reference_has_parts():
    listed = "- It costs \\boxed{4}.\n- So the change is \\boxed{6}."
    assert response_answer(listed, True) == "6"
    assert response_answer(listed, True, has_parts=True) == "4, 6"
    assert response_answer("1. \\boxed{4}\n2. \\boxed{6}", True, has_parts=True) == "6"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("work\n#### 1,005", "1,005"),
        ("work\n#### 8.0\n", "8.0"),
        ("#### Step 1\nwork", None),
        ("#### 12\nLet me check.", "12"),
        (r"\boxed{1}" + "\n#### 2", "1"),
        ("work\n#### Final answer: 7", "7"),
        ("work\n#### **Answer:** 7", "7"),
        ("work\n#### The answer is 7\nThat was easy.", "7"),
        ("work\n#### Answer: x + 1", "x + 1"),
        ("####", None),
    ],
)
def test_a_marked_line_holds_the_answer_where_there_is_no_box(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>\nmaybe \\boxed{3}? no\n</think>\n\nIt is seven.", "It is seven."),
        ("maybe \\boxed{3}? no\n</think>\n\nIt is seven.", "It is seven."),
        ("<think>maybe \\boxed{3}", ""),
        ("<|begin_of_thought|>\\boxed{3}<|end_of_thought|> Seven.", "Seven."),
        ("<think>a \\boxed{1}</think>Well.<think>\\boxed{2}</think> Seven.", "Well. Seven."),
    ],
)
def test_boxes_in_thinking_never_count(text, rest):
    assert without_thinking(text) == rest
    assert final_answer(text) is None and boxed_answer(text) is None
    assert boxed_answer(text + r" \boxed{7}") == (None if rest == "" else "7")


def test_text_without_thinking_stays_as_it_is():
    assert without_thinking("  a <b> c \n") == "  a <b> c \n"
    assert last_boxed(r"<think>\boxed{3}</think>") is not None  # a span of the text, whatever surrounds it


def test_only_a_prompt_that_ends_in_an_open_block_opens_thinking():
    assert opens_thinking("assistant\n<think>\n") == "<think>"
    assert opens_thinking("assistant\n<think>\n\n</think>\n\n") == "" == opens_thinking("What is <think>?\nassistant\n")


class MarksAreSpecial:
    """A tokenizer of one token a character, whose think marks are special tokens."""

    all_special_ids, all_special_tokens = [1, 2, 3], ["<think>", "</think>", "<eos>"]

    def decode(self, ids, skip_special_tokens=False):
        names = dict(zip(self.all_special_ids, self.all_special_tokens, strict=True))
        return "".join("" if skip_special_tokens and i in names else names.get(i, chr(i)) for i in ids)


def test_a_response_keeps_its_think_marks_and_one_that_starts_inside_thinking_says_so():
    ids, tokenizer = [1, *b"3?", 2, *b"4", 3], MarksAreSpecial()
    assert decode_response(tokenizer, [*b"ask"], ids) == "<think>3?</think>4"
    cut_off = decode_response(tokenizer, [*b"ask", 1, *b"\n"], [*rb"\boxed{3} or"])
    assert cut_off == r"<think>\boxed{3} or" and boxed_answer(cut_off) is None


@pytest.mark.parametrize(
    "text",
    ["notfound", "Not found.", "proof", "N/A", "n/a", "NA", "", "  ", "None", "null", "NaN", "-", r"$\text{N/A}$", "?"]
    + [r"\boxed{proof}", r"\boxed{}", "#### N/A", "No answer", "unknown"],
)
def test_an_answer_that_says_there_is_none_is_none(text):
    assert column_answer(text) == ""


@pytest.mark.parametrize(
    "text", ["7", r"\emptyset", r"\varnothing", "no", r"\text{No solution}", "0", "-1", "N", "A", "a n"]
)
def test_answers_that_only_look_like_none_are_answers(text):
    assert column_answer(text) == text
