r"""Finds spans that must not be cut (LaTeX mathematics, code fences), and the boxes that state answers.

Scans run in time linear in the text, since every rollout is searched for its box, and model output can be long and
adversarial.
"""

from __future__ import annotations

import re
from bisect import bisect_right

__all__ = ["Box", "boxes", "last_boxed", "protected_spans"]

Box = tuple[int, int, str]  # start, end, content

# Openers: code fence, environment, \[ \( , $$ or $. Matches escaped characters too, so that they open nothing.
_OPENER = re.compile(r"```|\\begin\s*\{([^{}]*)\}|\\\[|\\\(|\\.|\$\$|\$", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([^{}]*)\}")
_DOLLAR = re.compile(r"\\.|(\$)", re.DOTALL)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_SENTENCE_INSIDE = re.compile(r"[.?!]\s+[A-Z]|\n")
_BOX_OR_BRACE = re.compile(r"\\(?:f?boxed|fbox)(?![A-Za-z])(?P<brace>\s*\{)?|\\.|[{}]", re.DOTALL)
# What follows "\boxed" without a brace: plain characters, and commands with their arguments.
_ARGUMENT = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_BARE_CONTENT = re.compile(r"[ \t]*((?:\\(?!f?boxed|fbox)[A-Za-z]+(?:" + _ARGUMENT + r")*|[^\s{}$\\])+)")
_SPACES = re.compile(r"\s*")
_MENTION = re.compile(r"[A-Za-z]{2,}|[^0-9A-Za-z]*")  # "the \boxed command", "`\boxed`"
_MAX_DOLLARS_TRIED = 4  # closers tried per inline "$" before it counts as a plain dollar sign: keeps the scan linear


def protected_spans(text: str) -> list[tuple[int, int]]:
    r"""Returns disjoint, ordered ``(start, end)`` spans of code fences, mathematics and LaTeX environments.

    A dollar sign before a digit counts as money, unless its closing dollar has no space before it, no digit after it
    and no sentence end in between. So "$5 and $6" is not protected, and "$5x$" is.

    >>> text = "Let $x = 3. Y$ cost $5."
    >>> [text[a:b] for a, b in protected_spans(text)]
    ['$x = 3. Y$']
    """
    spans: list[tuple[int, int]] = []
    hopeless: set[str] = set()  # closers known not to occur in the rest of the text
    environments = _environment_ends(text)
    dollars = [match.start() for match in _DOLLAR.finditer(text) if match.group(1)]
    position = 0
    while (opener := _OPENER.search(text, position)) is not None:
        token, start = opener.group(), opener.start()
        position = opener.end()
        if token == "$":
            end = _inline_end(text, start, dollars)
        elif token == "$$" or token == "```" or token in (r"\[", r"\("):
            closer = {r"\[": r"\]", r"\(": r"\)"}.get(token, token)
            end = _find(text, closer, position, hopeless)
        elif opener.group(1) is not None:
            end = environments.get(position, -1)
        else:  # an escaped character such as \$
            end = -1
        if end > 0:
            spans.append((start, end))
            position = end
    return spans


def last_boxed(text: str) -> Box | None:
    r"""Returns ``(start, end, content)`` of the last box; ``None`` without one, or if it is cut off.

    >>> last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}")[2], last_boxed(r"\boxed{1} and \boxed{3")
    ('\\frac{1}{2}', None)
    """
    found, cut_off = boxes(text)
    return found[-1] if found and not cut_off else None


def boxes(text: str) -> tuple[list[Box], bool]:
    r"""Returns the closed boxes by start, innermost only, and whether the box that opens last is cut off.

    A box is ``\boxed{...}``, ``\fbox{...}``, or ``\boxed`` with a bare argument: ``\boxed 5``, ``\boxed5``. Braces
    nest; ``\{`` and ``\}`` do not count. Empty boxes, and ``\boxed`` before a word, are no boxes.

    >>> boxes(r"\boxed{1}, \fbox{2}, \boxed 3 and \boxed{4")
    ([(0, 9, '1'), (11, 19, '2'), (21, 29, '3')], True)
    """
    # (start, end, start of the content, its end). Boxes may nest, so contents are not copied yet.
    closed: list[tuple[int, int, int, int]] = []
    text_end = len(text.rstrip())
    open_at: list[tuple[int, int]] = []  # (start of the command or -1 for a plain brace, start of the content)
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start, content = open_at.pop() if open_at else (-1, 0)
            if start >= 0 and _SPACES.match(text, content).end() < match.end() - 1:
                closed.append((start, match.end(), content, match.end() - 1))
        elif token == "{":
            open_at.append((-1, match.end()))
        elif match["brace"]:
            open_at.append((match.start(), match.end()))
        elif "box" in token:
            if match.end() >= text_end:
                open_at.append((match.start(), match.end()))
            elif bare := _bare_box(text, match.end()):
                closed.append((match.start(), bare[1], *bare))
    closed.sort()
    next_start = [box[0] for box in closed[1:]] + [len(text)]
    innermost: list[Box] = [
        (start, end, text[content:content_end].strip())
        for (start, end, content, content_end), following in zip(closed, next_start, strict=False)
        if following >= end
    ]
    last_closed = innermost[-1][0] if innermost else -1
    return innermost, any(start > last_closed for start, _ in open_at)


def _bare_box(text: str, end: int) -> tuple[int, int] | None:
    """Returns start and end of the content that follows a box command without braces, which ends at `end`."""
    found = _BARE_CONTENT.match(text, end)
    content = found[1].rstrip(".,;:!?*'\"`") if found else ""
    return None if found is None or _MENTION.fullmatch(content) else (found.start(1), found.start(1) + len(content))


def _find(text: str, closer: str, position: int, hopeless: set[str]) -> int:
    """Returns the end of the next ``closer``, or -1. Adds a missing closer to ``hopeless``, to search only once."""
    if closer in hopeless:
        return -1
    found = text.find(closer, position)
    if found < 0:
        hopeless.add(closer)
        return -1
    return found + len(closer)


def _environment_ends(text: str) -> dict[int, int]:
    r"""Returns the end of the matching ``\end{name}`` by the end of each ``\begin{name}`` that has one."""
    ends: dict[int, int] = {}
    open_at: dict[str, list[int]] = {}  # of one name, they nest; of different names, they need not
    for match in _ENVIRONMENT.finditer(text):
        begins = open_at.setdefault(match.group(2), [])
        if match.group(1) == "begin":
            begins.append(match.end())
        elif begins:
            ends[begins.pop()] = match.end()
    return ends


def _inline_end(text: str, start: int, dollars: list[int]) -> int:
    """Returns the end of the inline formula that opens at ``start``, or -1 if that dollar opens no formula.

    ``dollars`` are the positions of the dollar signs that are not escaped.
    """
    money = text[start + 1 : start + 2].isdigit()
    position, next_dollar = start + 1, bisect_right(dollars, start)
    for close in dollars[next_dollar : next_dollar + (1 if money else _MAX_DOLLARS_TRIED)]:
        if _BLANK_LINE.search(text, position - 1, close):
            return -1
        followed_by_digit = text[close + 1 : close + 2].isdigit()
        spaced = text[close - 1].isspace()
        inside = text[start + 1 : close]
        if not followed_by_digit and inside.strip() and not (money and (spaced or _SENTENCE_INSIDE.search(inside))):
            return close + 1
        position = close + 1
    return -1
