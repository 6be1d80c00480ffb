r"""Reads final answers: the last box or ``####`` line of a text, and answers that say there is none.

The loader, the references and the grader all read answers here.
"""

from __future__ import annotations

import re
from itertools import pairwise

from atesd.data.latex_spans import Box, boxes, last_boxed, protected_spans
from atesd.data.listed_answers import listed_boxes
from atesd.data.sentences import cut, sentence_cuts
from atesd.data.thinking import without_thinking

__all__ = [
    "answer_end",
    "boxed_answer",
    "boxed_parts",
    "column_answer",
    "final_answer",
    "has_box",
    "marked_answer",
    "marker_line",
    "response_answer",
]

_PLAIN_NUMBER = re.compile(r"[-+]?[$£€]?\s*[-+]?[\d.,/]+\s*%?")
_ANSWER_IS = re.compile(
    r"(?:\W*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:|\W*the\s+(?:final\s+)?answer\s+is\b)[\s*_]*", re.I
)
# Between two boxes of one answer: "and", "or" or a comma. If the second box restates or follows from the first, the
# text states one answer, and which is unclear.
_JOINS = re.compile(r"\b(?:and|or)\b|[,;&]", re.I)
_RESTATES = re.compile(
    r"\b(?:i\.e|that is|which is|equivalent\w*|approximat\w*|about|simplif\w*|so|thus|hence|therefore|then|since"
    r"|because|giv(?:es|ing)|mak(?:es|ing)|namely|equals?)\b|\\approx|≈|=\s*\$?\s*$",
    re.I,
)
_NAME_BEFORE = re.compile(r"[A-Za-z]\w*(?:_\{?\w+\}?)?\s*=\s*$")  # the "y =" of "x = \boxed{1}, y = \boxed{2}"
_LONGEST_NAME = 80  # characters; each is searched from, so a limit keeps the scan linear
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|f?boxed|fbox)\s*(?=\{)")
_NOT_AVAILABLE = re.compile(r"n\s*/\s*a|n\.\s*a\.?|NA", re.I)
_SAYS_NONE = {"notfound", "proof", "none", "null", "nan", "noanswer", "nofinalanswer", "unknown", "notavailable"}
_SAYS_NONE |= {"notapplicable", "seesolution", "seeproof", "tobeproved", "proofproblem", "answernotfound"}


def final_answer(text: str) -> str | None:
    r"""Returns the answer that a solution states: its last ``\boxed{...}``, else the last ``#### ...`` line, else None.

    Several boxes in one final sentence, or in the items of a final list, are one answer with parts, "2, -2". It is None
    if the last box is cut off, or if it is unclear whether several boxes are parts. A ``####`` line counts only if it
    is last or holds a plain number; otherwise it is a heading. Thinking does not count.

    >>> final_answer(r"so $x = \boxed{\frac{1}{2}}$"), final_answer("5 + 5\n#### 10"), final_answer("ten")
    ('\\frac{1}{2}', '10', None)
    >>> final_answer(r"$x = \boxed{2}$ or $x = \boxed{-2}$."), final_answer(r"\boxed{4}. No, \boxed{5")
    ('2, -2', None)
    """
    text = without_thinking(text)
    return boxed_parts(text) if has_box(text) else marked_answer(text)


def boxed_answer(text: str) -> str | None:
    r"""Returns the content of the last box outside thinking; None without one, or if the last box is cut off."""
    box = last_boxed(without_thinking(text))
    return None if box is None else box[2]


def response_answer(text: str, box_only: bool, has_parts: bool = False) -> str | None:
    r"""Returns the answer of a response: the parts in its last sentence's boxes, else its last box, or None.

    Args:
        text: a response, `without_thinking`.
        box_only: whether a `####` line is no answer.
        has_parts: whether the reference has several parts. Only then the boxes of a list are parts: else a response
            that lists its steps would lose its last box.

    >>> response_answer(r"\boxed{2} and \boxed{-2}", True), response_answer(r"\boxed{0.5} = \boxed{1/2}", True)
    ('2, -2', '1/2')
    """
    if not has_box(text):
        return None if box_only else marked_answer(text)
    last = last_boxed(text)
    return boxed_parts(text, in_lists=has_parts) or (last and last[2])


def boxed_parts(text: str, in_lists: bool = True) -> str | None:
    """Returns the boxes of the list or sentence with the last one, joined by ", ".

    None without a box, if the last is cut off, if the sentence does not list its boxes with commas, "and" or "or", or
    if a list's items may be steps. `in_lists`: whether the items of a list may be parts.
    """
    found, cut_off = boxes(text)
    if not found or cut_off:
        return None
    listed = listed_boxes(text, found) if in_lists and len(found) > 1 else []
    if listed is None or listed:
        return None if listed is None else ", ".join(listed)
    sentence = _sentence_of(text, found) if len(found) > 1 else found
    if len({content for _, _, content in sentence}) == 1:
        return sentence[-1][2]
    gaps = [_without_name(text[first[1] : second[0]]) for first, second in pairwise(sentence)]
    if not all(_JOINS.search(gap) and not _RESTATES.search(gap) for gap in gaps):
        return None
    return ", ".join(content for _, _, content in sentence)


def _without_name(gap: str) -> str:
    """The text between two boxes without the name of the second: ", " of ", y = "."""
    return gap[:-_LONGEST_NAME] + _NAME_BEFORE.sub("", gap[-_LONGEST_NAME:])


def _sentence_of(text: str, found: list[Box]) -> list[Box]:
    """Returns those boxes that are in the sentence of the last one, and made by the same command: \\fbox or \\boxed."""
    begin = 0
    for piece in cut(text, sentence_cuts(text), protected_spans(text)):
        if begin + len(piece) > found[-1][0]:
            break
        begin += len(piece)
    framed = text.startswith("\\fbox", found[-1][0])
    return [box for box in found if box[0] >= begin and text.startswith("\\fbox", box[0]) == framed]


def answer_end(text: str) -> int:
    r"""Returns where the last answer of a response ends: its last closed box, else its ``####`` line; else its length.

    >>> text = r"So \boxed{7}. Wait, let me see."
    >>> text[answer_end(text) :]
    '. Wait, let me see.'
    """
    found, _ = boxes(text)
    if found:
        return found[-1][1]
    marker = marker_line(text)
    if marker is None:
        return len(text)
    end = text.find("\n", marker)
    return len(text) if end < 0 else end


def has_box(text: str) -> bool:
    """Whether a box closes or opens in the text."""
    found, cut_off = boxes(text)
    return bool(found) or cut_off


def marked_answer(text: str) -> str | None:
    """Returns the answer on the last ``####`` line, without "Final answer:" before it; None without such a line.

    >>> marked_answer("3 + 4 = 7\\n#### Final answer: 7")
    '7'
    """
    start = marker_line(text)
    return None if start is None else _marked(text[start:].lstrip().split("\n", 1)[0])


def _marked(line: str) -> str:
    line = line.strip("# \t\r")
    said = _ANSWER_IS.match(line)
    return line[said.end() if said else 0 :].strip("*_ \t")


def column_answer(text: str | None) -> str:
    r"""Returns the answer in a column: what it boxes or marks, else its text. "" if it says that there is none.

    >>> [column_answer(text) for text in ("7", r"It is $\boxed{7}$", "N/A", r"\text{notfound}", r"\boxed{7")]
    ['7', '7', '', '', '']
    """
    text = without_thinking(text or "").strip()
    answer = final_answer(text) or ("" if has_box(text) else text)
    return "" if says_none(answer) else answer


def says_none(answer: str) -> bool:
    """Whether an answer says that there is none: empty, "notfound", "proof", "N/A" and their like."""
    plain = re.sub(r"[{}$()\[\]]", "", _TEXT_COMMAND.sub("", answer)).strip(" \t\r\n.,:;!?-–—_")
    return not plain or bool(_NOT_AVAILABLE.fullmatch(plain)) or re.sub(r"[\s_-]", "", plain).casefold() in _SAYS_NONE


def marker_line(text: str) -> int | None:
    """Returns the start of the ``#### answer`` line that states the answer, or None. Examines each line once, however
    many markers it has: responses may repeat themselves."""
    end, last = len(text), True
    while (start := text.rfind("####", 0, end)) >= 0:
        line_start = text.rfind("\n", 0, start) + 1
        line_end = text.find("\n", start)
        line_end = len(text) if line_end < 0 else line_end
        line = text[line_start:line_end]
        first = line.find("####")
        if not line[:first].strip() and not line.startswith("#####", first):
            content = _marked(line)
            is_last = last and line_start + first == start and not text[line_end:].strip()
            if content and (is_last or _PLAIN_NUMBER.fullmatch(content)):
                return line_start
        end, last = line_start, False
    return None
