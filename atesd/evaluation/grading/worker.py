r"""Worker process that compares answers with math-verify. Reads requests from stdin, writes verdicts to stdout.

It is a process because a parser that hangs inside C code can only be stopped by killing its process. This file must
not import torch.

Protocol: one JSON object per line. On start, ``{"ready": true}`` or ``{"failed": why}``. A request has ``gold``,
``target`` and ``whole_text`` (bool). A reply has ``correct`` (bool), ``extracted`` (string or null) and ``reason``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import sys
from typing import Any

MEMORY_LIMIT = "memory limit"  # the reason in the last reply: the process exits after it
MEMORY_LIMIT_BYTES = 3 << 30  # address space: a tower of powers fails instead of exhausting memory


def serve(time_limit: float) -> None:
    """Answers requests until stdin closes."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    logging.disable(logging.CRITICAL)
    try:
        compare = load_compare()
    except Exception as error:
        _send(reply, {"failed": f"{type(error).__name__}: {error}"})
        return
    _limit_memory()
    _send(reply, {"ready": True})
    for line in sys.stdin:
        # The parent kills a late worker. If the parent is dead, the CPU timer's default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, time_limit + 1)
        try:
            answer = compare(**json.loads(line))
        except MemoryError:
            _send(reply, {"correct": False, "extracted": None, "reason": MEMORY_LIMIT})
            return  # the heap may be fragmented: the next answer gets a new process
        except (Exception, RecursionError) as error:
            answer = {"correct": False, "extracted": None, "reason": f"error: {type(error).__name__}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(reply, answer)


def load_compare() -> Any:
    """Imports math-verify and returns ``compare(gold, target, whole_text) -> dict``."""
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=4096)
    def parse_gold(gold: str) -> list[Any]:
        return parse(f"\\boxed{{{gold}}}", parsing_timeout=None)

    def compare(gold: str, target: str, whole_text: bool) -> dict[str, Any]:
        parsed_gold = parse_gold(gold)
        parsed = parse(target if whole_text else f"\\boxed{{{target}}}", parsing_timeout=None)
        extracted = target if not whole_text else (parsed[-1] if parsed and isinstance(parsed[-1], str) else None)
        if not parsed_gold or not parsed:
            what = "the reference answer" if not parsed_gold else "the answer"
            return {"correct": False, "extracted": extracted, "reason": f"cannot read {what}"}
        correct = bool(verify(parsed_gold, parsed, timeout_seconds=None))
        return {"correct": correct, "extracted": extracted, "reason": "equal" if correct else "different"}

    return compare


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every platform supports it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def _send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
