"""Reads chats as data sets hold them: lists of turns, each with a role and a text.

In a chat with one user turn that turn is the problem, and the system turns before it are read too. Nothing else around
it is. In a chat with several, the last user turn is asked, and all turns before it are read as they are; an assistant's
turn after it is the solution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atesd.data.solutions import solution_text
from atesd.errors import DataError

__all__ = ["Turn", "earlier_turns", "is_chat", "turns_for"]

Turn = tuple[str, str]  # role and text

ROLES = {"problem": "user", "solution": "assistant", "answer": "assistant"}
_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
_CARRIED = ("system", "user", "assistant")


def is_chat(value: Any) -> bool:
    turns = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return bool(turns) and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)


def turns_for(chat: Sequence[Mapping[str, Any]], key: str, of_problem: bool) -> list[Any]:
    """Returns the texts of the user's turns (for the problem) or of the assistant's (for solution and answer).

    Args:
        of_problem: whether the chat is the problem's. Of several user turns it asks the last; the turns before it are
            then left out.
    """
    asked = _last_asked(chat)
    begin = asked if of_problem and asked is not None else 0
    return [_content(turn) for turn in chat[begin:] if _role(turn) == ROLES[key]]


def earlier_turns(chat: Sequence[Mapping[str, Any]], where: str) -> tuple[Turn, ...]:
    """Returns the turns before the last user turn; only the system turns of them if there is one user turn.

    An assistant's text is read as a solution is, without its thinking.

    Args:
        where: row and column, for messages.

    Raises DataError for a turn that a prompt cannot carry. For a chat of several user turns, also for any turn that is
    not system, user or assistant, and for more than a reply after the last user turn.
    """
    asked = _last_asked(chat)
    if asked is None:
        roles = [_role(turn) for turn in chat]
        before = chat[: roles.index("user")] if "user" in roles else ()
        return tuple(("system", _text(turn, where)) for turn in before if _role(turn) == "system")
    for turn in chat:
        if _role(turn) not in _CARRIED:
            raise DataError(
                f"{where} holds a chat with a {_role(turn)!r} turn, and a chat of several turns is read with system, "
                "user and assistant turns only: take the row out, or write the turn into another"
            )
        if turn.get("tool_calls") or turn.get("function_call"):
            raise DataError(f"{where} holds a chat with an assistant turn that calls tools: take the row out")
    after = [_role(turn) for turn in chat[asked + 1 :]]
    if after not in ([], ["assistant"]):
        raise DataError(
            f"{where} holds a chat with {', '.join(after)} after its last user turn; one assistant turn may follow, "
            "the solution"
        )
    return tuple((_role(turn), _text(turn, where)) for turn in chat[:asked])


def _last_asked(chat: Sequence[Mapping[str, Any]]) -> int | None:
    """Where the last of several user turns is; None if there is at most one."""
    places = [place for place, turn in enumerate(chat) if _role(turn) == "user"]
    return places[-1] if len(places) > 1 else None


def _role(turn: Mapping[str, Any]) -> str:
    role = turn.get("role") or turn.get("from")
    return _NAMES.get(str(role), str(role))


def _text(turn: Mapping[str, Any], where: str) -> str:
    """The text of an earlier turn. Only a system turn may be empty."""
    role, text = _role(turn), _content(turn)
    if not isinstance(text, str):
        raise DataError(f"{where} holds a chat with {_a(role)} turn that is no text but {type(text).__name__}")
    text = solution_text(text).strip() if role == "assistant" else text.strip()
    if not text and role != "system":
        thought = " (thinking does not count)" if role == "assistant" else ""
        raise DataError(f"{where} holds a chat with an empty {role} turn{thought}: fill it, or take the row out")
    return text


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def _content(turn: Mapping[str, Any]) -> Any:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as vision models take them
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content or ""
