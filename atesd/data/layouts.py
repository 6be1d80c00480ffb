"""Knows the columns of the data sets people have: which hold problem, solution and answer, and how to read their cells.

A column can be named with dots, `reward_model.ground_truth`, and can hold a chat (`chats.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from atesd.data.answers import final_answer
from atesd.data.chats import ROLES, Turn, earlier_turns, is_chat, turns_for
from atesd.errors import DataError

__all__ = ["cell", "chat_before", "find_columns", "problem_text", "text_list", "weight"]

Columns = dict[str, str | None]

# Where a column with a default name is looked for, in this order, ignoring case.
KNOWN = {
    "problem": ("problem", "question", "extra_info.question", "prompt", "conversations", "messages"),
    "solution": (
        "solution",
        "generated_solution",  # OpenMathReasoning
        "deepseek_solution",  # OpenThoughts, its metadata
        "ground_truth_solution",
        "extra_info.answer",  # verl
        "conversations",
        "messages",
    ),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth", "reward_model.ground_truth"),
}
SAMPLED = 20  # rows read to see whether a nested column or a worked answer is there
# What data sets write around their problems, (before, after). The prompt templates say themselves how to answer.
INSTRUCTIONS = (
    (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
    ("", ' Let\'s think step by step and output the final answer after "####".'),
    ("", " Let's think step by step and output the final answer within \\boxed{}."),
    ("Return your final response within \\boxed{}. ", ""),
)


def find_columns(name: str, dataset: Any, wanted: Columns, require_solution: bool) -> Columns:
    """Returns the column of each of "problem", "solution" and "answer"; None for one that is not read.

    Args:
        name: the data set's, for messages.
        dataset: has `column_names`, a length, and rows by index.
        wanted: the columns as configured. One with its default name is looked for under the names in `KNOWN`.
        require_solution: whether the solution column must exist.

    Raises DataError naming the missing columns.
    """
    head = [dataset[row] for row in range(min(SAMPLED, len(dataset)))]
    found = {key: _find(key, column, dataset.column_names, head) for key, column in wanted.items()}
    answer = found["answer"]
    if answer and found["solution"] is None and wanted["solution"] == "solution":
        worked = any(_is_worked(record, answer) for record in head)  # GSM8K
        found["solution"] = answer if worked else None
    if found["answer"] == found["solution"]:
        found["answer"] = None  # then it is extracted from the solution
    needed = [key for key in ("problem", "solution") if key == "problem" or require_solution]
    missing = {f"{key}_column={wanted[key]!r}" for key in needed if found[key] is None}
    if wanted["answer"] not in (None, "answer", wanted["solution"]) and found["answer"] is None:
        missing.add(f"answer_column={wanted['answer']!r}")
    if not require_solution and found["solution"] is None and found["answer"] is None:
        missing.add(f"answer_column={wanted['answer']!r}")
    if missing:
        raise DataError(
            f"{name} has no column for {', '.join(sorted(missing))}; its columns are {sorted(dataset.column_names)}. "
            "A nested column is named with dots, as in reward_model.ground_truth"
        )
    return found


def _find(key: str, column: str | None, present: Sequence[str], head: list[dict[str, Any]]) -> str | None:
    """Returns the column to read for `key`, or None if there is none."""
    if column is None:
        return None
    by_case = {name.casefold(): name for name in reversed(present)}
    for candidate in KNOWN[key] if column == key else (column,):
        if candidate in present:
            exact: str | None = candidate
        elif column == key and "." not in candidate:
            exact = by_case.get(candidate)
        else:
            exact = candidate if any(_value(record, candidate) is not None for record in head) else None
        if exact and (exact.casefold() == column or not _lacks_turn(key, exact, head)):
            return exact
    return None


def _lacks_turn(key: str, column: str, head: list[dict[str, Any]]) -> bool:
    """Whether the column holds chats without a turn for `key`: a prompt has no assistant turn, for example."""
    chats = [value for record in head if is_chat(value := _plain(_value(record, column)))]
    return bool(chats) and not any(turns_for(chat, key, of_problem=True) for chat in chats)


def _is_worked(record: dict[str, Any], column: str) -> bool:
    """Whether an answer is a worked solution that states its answer at the end."""
    value = _value(record, column)
    stated = final_answer(value) if isinstance(value, str) else None
    return stated is not None and len(value.strip()) > len(stated) + len("$\\boxed{}$")


def cell(record: dict[str, Any], key: str, column: str | None, where: str, of_problem: bool = False) -> str:
    """Returns the text of a record's problem, solution or answer, stripped; "" for an empty cell.

    `of_problem`: whether the problem is read from this column too, so that a chat of several turns is one dialogue.

    Raises DataError, naming row and column, for a cell that is neither text, a number nor a chat with one such turn.
    """
    value = _plain(_value(record, column)) if column else None
    if is_chat(value):
        turns = turns_for(value, key, of_problem)
        if len(turns) > 1:
            raise DataError(f"{where}: column {column!r} holds a chat with {len(turns)} {ROLES[key]} turns, not one")
        value = turns[0] if turns else None
    if key == "answer" and isinstance(value, str):
        value = _plain(_decoded(value))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of integers with gaps is read as one of floats
    if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
        return str(value).strip()
    shown = json.dumps(value, default=str)[:80]
    raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text or a number: {shown}")


def chat_before(record: dict[str, Any], column: str, where: str) -> tuple[Turn, ...]:
    """Returns the turns of a record's chat before its last user turn, as `earlier_turns` does; none for a text.

    Raises DataError, naming row and column, for turns that no prompt can carry.
    """
    value = _plain(_value(record, column))
    return earlier_turns(value, f"{where}: column {column!r}") if is_chat(value) else ()


def text_list(record: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """Returns the texts of a list column, stripped, without empty ones. A CSV file holds the list as JSON.

    Raises DataError, naming row and column, for a cell that is no list of texts.
    """
    value = _value(record, column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(piece, str) for piece in value):
        shown = json.dumps(value, default=str)[:80]
        raise DataError(
            f"{where}: segments_column={column!r} must hold a list of texts, not {shown}; the columns are "
            f"{sorted(record)}"
        )
    return tuple(piece.strip() for piece in value if piece.strip())


def weight(record: dict[str, Any], column: str, where: str) -> float:
    """Returns a record's weight. A CSV file holds the number as text.

    Raises DataError, naming row and column, for a cell that is no finite number of at least 0.
    """
    value = _plain(_value(record, column))
    found = math.nan
    if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            found = float(value)
    if not 0 <= found < math.inf:
        raise DataError(
            f"{where}: weight_column={column!r} must hold a finite number of at least 0, not "
            f"{json.dumps(value, default=str)[:80]}; the columns are {sorted(record)}"
        )
    return found


def problem_text(text: str) -> str:
    """Returns a problem without the instruction that DAPO, verl or OpenThoughts write around it."""
    for before, after in INSTRUCTIONS:
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)].strip()
    return text


def _value(record: Any, path: str) -> Any:
    """Returns `record[path]`, or the value at a path with dots; None if there is none."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    for part in path.split("."):
        if isinstance(record, Mapping):
            record = record.get(part)
        elif isinstance(record, Sequence) and part.isdigit() and int(part) < len(record):
            record = record[int(part)]
        else:
            return None
    return record


def _plain(value: Any) -> Any:
    """Returns tensors, arrays and their scalars as Python's, and the element of a list of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], Mapping):
        return _plain(value[0])
    return value


def _decoded(text: str) -> Any:
    """Returns the list of texts that `text` holds as JSON (Skywork), else `text`. "[1, 2]" is an interval."""
    if not text.lstrip().startswith('["'):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if all(isinstance(part, str) for part in value) else text
