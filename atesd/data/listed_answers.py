r"""Finds answers whose parts stand in the items of the list that ends a text: "(a) ... \boxed{2} (b) ... \boxed{5}".

Solutions also list their steps, and may box what a step gives. So labels (letters, Roman numbers, "Part 2") make parts
of boxes, bullets do if each item has one box, and a numbered list in which each item has one box is unclear.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import pairwise

from atesd.data.latex_spans import Box

__all__ = ["listed_boxes"]

_START = r"(?:^[ \t]*(?:[-*+•][ \t]+|#{1,6}[ \t]+)?|(?<=[.;:!?])[ \t]+)(?:\*\*|__)?"  # of a line, or after a sentence
_LABELS = (
    re.compile(_START + r"\(?([a-hA-H])[.)](?=[\s*_:.])", re.MULTILINE),
    re.compile(_START + r"\(?([ivx]{1,4})[.)](?=[\s*_:.])", re.MULTILINE),
    re.compile(_START + r"Part[ \t]+\(?([A-Ha-h]|[IVXivx]{1,4}|\d)\b\)?", re.MULTILINE | re.IGNORECASE),
)
_NUMBER = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*)?\(?(\d{1,2})[.)](?=[\s*])", re.MULTILINE)
_BULLET = re.compile(r"^([ \t]*)[-*+•][ \t]+(?=\S)|\\item\b", re.MULTILINE)
_LIST_END = re.compile(r"\n[ \t]*\n(?=\S)|\\end[ \t]*\{(?:itemize|enumerate)\}")  # of bullets: a new paragraph
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")


def listed_boxes(text: str, found: list[Box]) -> list[str] | None:
    r"""Returns the contents of the boxes that are parts of the answer, in order.

    Args:
        found: all boxes of the text, in order.

    Returns:
        An empty list if the last box is not in the last item of a list, or if no other item has a box; None if it is
        unclear whether the boxes are parts.

    >>> from atesd.data.latex_spans import boxes
    >>> for text in (r"(a) It is \boxed{2}. (b) It is \boxed{5}.", "1. \\boxed{2}\n2. \\boxed{5}", r"\boxed{5}"):
    ...     print(listed_boxes(text, boxes(text)[0]))
    ['2', '5']
    None
    []
    """
    last = found[-1][0]
    for label in _LABELS:
        items = _contents(_counted(label, text, last), len(text), found)
        boxed = [item for item in items if item]
        if _differ(boxed) and items[-1]:
            return [item[0] for item in boxed] if all(len(item) == 1 for item in boxed) else None
    ending = _LIST_END.search(text, last)
    for starts, are_parts in ((_bullets(text, last), True), (_numbers(text, last), False)):
        items = _contents(starts, ending.start() if ending else len(text), found)
        if _differ(items) and all(len(item) == 1 for item in items):
            return [item[0] for item in items] if are_parts else None
    return []


def _differ(items: list[list[str]]) -> bool:
    return len({content for item in items for content in item}) > 1 and len(items) > 1


def _contents(starts: list[int], end: int, found: list[Box]) -> list[list[str]]:
    """Returns the different contents of the boxes in each item, from its start to the next one's."""
    at = [bisect_left(found, (position,)) for position in [*starts, end]]
    return [list(dict.fromkeys(box[2] for box in found[a:b])) for a, b in pairwise(at)]


def _counted(label: re.Pattern[str], text: str, last: int) -> list[int]:
    """Returns the starts of the items that count up from the first one to the one before `last`."""
    items = [(_count(m[1]), m.start()) for m in label.finditer(text, 0, last)]
    starts: list[int] = []
    wanted = items[-1][0] if items else 0
    for count, start in reversed(items):
        if count == wanted:
            starts.append(start)
            wanted -= 1
    return starts[::-1] if wanted == 0 else []


def _count(label: str) -> int:
    """The place in its list, from 1: 2 of "2", "b" and "ii"."""
    label = label.lower()
    if label.isdigit():
        return int(label)
    return _ROMAN.index(label) + 1 if label in _ROMAN else ord(label[0]) - ord("a") + 1


def _numbers(text: str, last: int) -> list[int]:
    starts = _counted(_NUMBER, text, last)
    return [] if starts and _LIST_END.search(text, starts[-1], last) else starts


def _bullets(text: str, last: int) -> list[int]:
    """Returns the starts of the bullets up to `last` of the list that holds it."""
    starts: list[int] = []
    end, indent = last, None
    for bullet in reversed(list(_BULLET.finditer(text, 0, last))):
        if starts and bullet[1] != indent:  # of a list inside an item
            continue
        if _LIST_END.search(text, bullet.end(), end):
            break
        end, indent = bullet.start(), bullet[1]
        starts.append(end)
    return starts[::-1]
