"""Finds the ends of sentences, and cuts text outside LaTeX and code fences.

No cut falls inside a number or after an abbreviation. If it is unclear whether a sentence ends, it does not.
"""

from __future__ import annotations

import re
from bisect import bisect_right

__all__ = ["cut", "line_start", "sentence_cuts"]

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


def cut(text: str, cuts: list[int], spans: list[tuple[int, int]]) -> list[str]:
    """Splits ``text`` at those ``cuts`` that are outside ``spans``. Merges white-space pieces into a neighbour."""
    starts = [start for start, _ in spans]
    pieces: list[str] = []
    begin = 0
    for end in [*cuts, len(text)]:
        span = bisect_right(starts, end - 1) - 1
        inside = span >= 0 and spans[span][0] < end < spans[span][1]
        if end <= begin or inside or not text[begin:end].strip():
            continue
        pieces.append(text[begin:end])
        begin = end
    if begin < len(text):  # trailing white space
        pieces[-1:] = [(pieces[-1] if pieces else "") + text[begin:]]
    return pieces


def sentence_cuts(text: str) -> list[int]:
    return [line_start(text, m.start(), m.end()) for m in _END.finditer(text) if _ends_sentence(text, m)]


def line_start(text: str, gap_start: int, gap_end: int) -> int:
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
