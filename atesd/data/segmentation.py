r"""Splits a reference solution into segments of working, a final answer and a tail.

``context.py`` decides how many of the segments a teacher reads. The paper defines the reference as segments r_1..r_m
and an answer. How to find them is our choice:

1. The *tail* is the end of the solution that states the answer: a last line ``#### N``, or else the last sentence if it
   holds the last ``\boxed{}``. The tail does not count in m, and only alpha = 1 exposes it. The answer itself is always
   shown, see ``prompts.py``. ``"".join(segments) + tail`` equals the solution exactly.
2. The text before the tail is the working. It is split at the coarsest structure that gives at least two segments:
   steps ("Step 1:", numbered lists), else paragraphs (blank lines), else sentences and lines.

White space between two segments belongs to the first. No cut falls inside LaTeX, a code fence, a number or an
abbreviation.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from atesd.data.latex_spans import last_boxed, protected_spans
from atesd.errors import DataError

__all__ = ["Reference", "boxed_answer", "final_answer", "segment", "split_reference"]

# "Step 3:", "**Step 3.**", "### Step 3 - title"
_STEP = re.compile(r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*|__)?(?:Step|STEP)[ \t]+\d+[ \t]*(?:[:.)\-–—*]|$)", re.MULTILINE)
# "1. ", "1) ", "(1) ", "**1.** ", "### 1. "
_NUMBERED = re.compile(r"^([ \t]*)(?:#{1,6}[ \t]*)?(?:\*\*)?\(?(\d{1,2})[.)](?:\*\*)?[ \t]+(?=\S)", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
# Candidate sentence ends: a stop with closing marks and white space, a full-width stop, or the end of a line.
# A run of spaces is scanned from its first one only: from each of them, the time would be quadratic.
_END = re.compile(
    r"""(?P<stop>[.?!…])['"”’)\]}*_$]*(?:\\[\])])?(?P<gap>\s+)|(?P<wide>[。？！]+\s*)|(?P<line>(?<![ \t])[ \t]*\n\s*)"""
)
_WORD_BEFORE = re.compile(r"(?P<previous>\S*)\s*(?<![A-Za-z.])(?P<word>[A-Za-z](?:[A-Za-z.]*[A-Za-z])?)$")
_INITIAL = re.compile(r"[A-Z]\.")
_ENUMERATOR = re.compile(r"^[ \t>*_#-]*\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})$")
# Abbreviations that never end a sentence, and those that end one unless a number follows.
_NEVER_LAST = "e.g i.e cf vs mr mrs ms dr prof st fig figs eq eqs sec thm prop lem cor def ch approx resp w.r.t viz pt"
_NOT_BEFORE_NUMBER = "no nos p pp vol ex a.m p.m u.s ft lb lbs oz hr hrs min sq mi yd in"
_NEVER_LAST_WORDS, _NOT_BEFORE_NUMBER_WORDS = frozenset(_NEVER_LAST.split()), frozenset(_NOT_BEFORE_NUMBER.split())
_DISPLAY_ENDS = re.compile(r"(?:\\\]|\$\$|\\end\{[^{}]*\})$")
_OPENS_MATH = ("$", "\\(", "\\[", "\\begin")
_WRAPPED = 40  # a line this long, followed by one in lower case, is a wrapped sentence, not two lines of working
_PLAIN_NUMBER = re.compile(r"[-+]?[$£€]?\s*[-+]?[\d.,/]+\s*%?")


@dataclass(frozen=True)
class Reference:
    """A split solution: ``segments`` of working, the ``answer``, and the ``tail`` that states the answer.

    ``tail`` is empty if the solution does not end by stating its answer. ``solution`` is the original text.
    """

    segments: tuple[str, ...]
    answer: str
    tail: str = ""

    @property
    def solution(self) -> str:
        return "".join(self.segments) + self.tail


def segment(solution: str) -> list[str]:
    r"""Splits ``solution`` into steps, else paragraphs, else sentences. ``"".join(segment(s)) == s`` for every s.

    >>> segment("Step 1: add.\n2 + 3 = 5.\nStep 2: double it.")
    ['Step 1: add.\n2 + 3 = 5.\n', 'Step 2: double it.']
    >>> segment("She pays 1,000.50 dollars, e.g. in cash. Then $x = 2. 5$ is left.")
    ['She pays 1,000.50 dollars, e.g. in cash. ', 'Then $x = 2. 5$ is left.']
    """
    spans = protected_spans(solution)
    for find_cuts in (_step_cuts, _paragraph_cuts, _sentence_cuts):
        pieces = _cut(solution, find_cuts(solution), spans)
        if len(pieces) >= 2:
            return pieces
    return [solution] if solution else []


def split_reference(solution: str, answer: str | None) -> Reference:
    r"""Splits ``solution`` into segments of working, the final answer and the tail.

    ``answer`` (the dataset's column) overrides the answer in the solution, without its ``\boxed{}`` or ``####``.

    >>> split_reference("2 + 3 = 5.\nTwice that is 10.\n#### 10", None)
    Reference(segments=('2 + 3 = 5.\n', 'Twice that is 10.\n'), answer='10', tail='#### 10')

    Raises ValueError if neither the column nor the solution has an answer.
    """
    given = (answer or "").strip()
    found = final_answer(given) or given or final_answer(solution)
    if not found:
        raise DataError(
            f"no final answer: the answer column is {answer!r} and the solution ends in {solution[-60:]!r}; "
            "give an answer column, or end the solution with \\boxed{...} or '#### ...'"
        )
    start = _tail_start(solution)
    return Reference(segments=tuple(segment(solution[:start])), answer=found, tail=solution[start:])


def final_answer(text: str) -> str | None:
    r"""Returns the last ``\boxed{...}`` (braces nest), else the last ``#### ...`` line, else ``None``.

    A ``####`` line counts only if it is last or holds a plain number; otherwise it is a heading.

    >>> final_answer(r"so $x = \boxed{\frac{1}{2}}$"), final_answer("5 + 5\n#### 10"), final_answer("ten")
    ('\\frac{1}{2}', '10', None)
    """
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    marker = _marker_line(text)
    return text[marker:].lstrip().split("\n", 1)[0].strip("# \t\r") if marker is not None else None


def boxed_answer(text: str) -> str | None:
    r"""Returns the content of the last non-empty ``\boxed{...}``, else ``None``."""
    box = last_boxed(text)
    return None if box is None else box[2]


def _marker_line(text: str) -> int | None:
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
            content = line.strip("# \t\r")
            is_last = last and line_start + first == start and not text[line_end:].strip()
            if content and (is_last or _PLAIN_NUMBER.fullmatch(content)):
                return line_start
        end, last = line_start, False
    return None


def _tail_start(solution: str) -> int:
    """Returns the start of the tail, or ``len(solution)`` if the solution does not end by stating its answer."""
    marker = _marker_line(solution)
    if marker is not None and "\n" not in solution[marker:].strip():
        return marker
    box = last_boxed(solution)
    if box is None:
        return len(solution)
    sentences = _cut(solution, _sentence_cuts(solution), protected_spans(solution))
    start = len(solution) - len(sentences[-1])
    return start if start <= box[0] else len(solution)


def _cut(text: str, cuts: list[int], spans: list[tuple[int, int]]) -> list[str]:
    """Splits ``text`` at those ``cuts`` that are outside ``spans``. Merges white-space pieces into a neighbour."""
    starts = [start for start, _ in spans]
    pieces: list[str] = []
    begin = 0
    for cut in [*cuts, len(text)]:
        span = bisect_right(starts, cut - 1) - 1
        inside = span >= 0 and spans[span][0] < cut < spans[span][1]
        if cut <= begin or inside or not text[begin:cut].strip():
            continue
        pieces.append(text[begin:cut])
        begin = cut
    if begin < len(text):  # trailing white space
        pieces[-1:] = [(pieces[-1] if pieces else "") + text[begin:]]
    return pieces


def _step_cuts(text: str) -> list[int]:
    """Returns line starts of "Step n" headings, else of the items of the outermost numbered list (1, 2, 3)."""
    steps = [m.start() for m in _STEP.finditer(text)]
    if len(steps) >= 2:
        return steps
    items = list(_NUMBERED.finditer(text))
    indent = min((len(m.group(1)) for m in items), default=0)
    cuts, previous = [], None
    for item in items:
        number = int(item.group(2))
        # A list starts at 0 or 1 and counts up. Any other number at the start of a line is not an item.
        if len(item.group(1)) == indent and (number <= 1 or (previous is not None and number == previous + 1)):
            cuts.append(item.start())
            previous = number
    return cuts if len(cuts) >= 2 else []


def _paragraph_cuts(text: str) -> list[int]:
    return [_line_start(text, m.start(), m.end()) for m in _BLANK_LINE.finditer(text)]


def _sentence_cuts(text: str) -> list[int]:
    return [_line_start(text, m.start(), m.end()) for m in _END.finditer(text) if _ends_sentence(text, m)]


def _line_start(text: str, gap_start: int, gap_end: int) -> int:
    """Returns the cut in a gap: after its last newline, so that the indent stays with its line, else at its end."""
    newline = text.rfind("\n", gap_start, gap_end)
    return newline + 1 if newline >= 0 else gap_end


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether a candidate (a stop or the end of a line) ends a sentence. False if unclear."""
    before, after = text[max(0, match.start() - 60) : match.start()], text[match.end() : match.end() + 8]
    line = before.rsplit("\n", 1)[-1]
    if not after or match["wide"]:
        return bool(after)
    if match["line"]:  # ends a line of working without a stop, unless it wraps or a formula comes before or after
        goes_on = after[0].islower() and (len(line) >= _WRAPPED or _DISPLAY_ENDS.search(before) is not None)
        return not (goes_on or after.startswith(_OPENS_MATH))
    new_line = "\n" in match["gap"]
    if match["stop"] != ".":
        return new_line or not after[0].islower()
    if _ENUMERATOR.match(line):  # "2. Multiply"
        return False
    if not new_line and (after[0].islower() or (before[-1:].isdigit() and after[0].isdigit())):
        return False
    found = _WORD_BEFORE.search(before)
    if found is None:
        return True
    word = found["word"]
    if len(word) == 1 and word.isupper() and not new_line:  # "George W. Bush", but "at the point O. Then"
        return not (found["previous"][:1].isupper() or _INITIAL.match(after))
    if word.lower() in _NOT_BEFORE_NUMBER_WORDS:
        return not after[0].isdigit()
    return word.lower() not in _NEVER_LAST_WORDS
