"""Finds a model's thinking in a text, and leaves it out.

What a model thinks is neither its answer nor a worked solution: boxes in it never count, and no reference holds it.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["decode_response", "opens_thinking", "without_thinking"]

# Marks that models and data sets write around their thinking: (opening, closing).
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_OPENING, _CLOSING = ("|".join(re.escape(pair[side]) for pair in MARKS) for side in (0, 1))
_MARK = re.compile(f"(?P<opening>{_OPENING})|(?:{_CLOSING})")
_OPENS_AT_END = re.compile(f"({_OPENING})\\s*$")


def without_thinking(text: str) -> str:
    """Returns `text` without its thinking, stripped if there was any; unchanged without.

    A block that is not closed reaches to the end. A closing mark without an opening one ends a block that starts with
    the text: some chat templates write the opening mark into the prompt.

    >>> [without_thinking(text) for text in ("<think>Is it 3?</think>It is 4.", "3?</think>4", "<think>3")]
    ['It is 4.', '4', '']
    """
    kept: list[str] = []
    end_of_last, opened = 0, False
    for mark in _MARK.finditer(text):
        if mark["opening"] and not opened:
            kept.append(text[end_of_last : mark.start()])
            opened = True
        elif not mark["opening"]:
            opened, end_of_last = False, mark.end()
    if not opened and not end_of_last:
        return text
    return "".join([*kept, "" if opened else text[end_of_last:]]).strip()


def opens_thinking(prompt: str) -> str:
    r"""Returns the mark that opens a thinking block at the end of `prompt`, or "".

    >>> opens_thinking("<|assistant|>\n<think>\n"), opens_thinking("<think>\n\n</think>\n\n")
    ('<think>', '')
    """
    found = _OPENS_AT_END.search(prompt[-100:])
    return found[1] if found else ""


def closing_mark(opening: str) -> str:
    """Returns the mark that closes the block which `opening` opens."""
    return dict(MARKS)[opening]


def decode_response(tokenizer: Any, prompt_ids: list[int], response_ids: list[int]) -> str:
    """Returns the text of a response to grade: without special tokens, but with the marks of its thinking.

    If the prompt opens a thinking block, the text starts with the opening mark.
    """
    marks = {mark for pair in MARKS for mark in pair}
    special = {i: t for i, t in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True) if t in marks}
    parts, begin = [], 0
    for index, token in enumerate(response_ids):
        if token in special:  # decode would drop it
            parts += [tokenizer.decode(response_ids[begin:index], skip_special_tokens=True), special[token]]
            begin = index + 1
    parts.append(tokenizer.decode(response_ids[begin:], skip_special_tokens=True))
    return opens_thinking(tokenizer.decode(prompt_ids[-8:])) + "".join(parts)
