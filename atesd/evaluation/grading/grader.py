r"""Grades final answers with math-verify, in reusable worker processes with a hard time limit.

Evaluation and training with a verifier reward both use it. Answers are first compared as text and as plain numbers
(``answer_text.py``). The rest goes to worker processes (``worker.py``). A worker that exceeds ``time_limit`` on an
answer is killed and replaced, so no answer takes longer than the limit.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atesd
from atesd.data.answers import final_answer, has_box, response_answer
from atesd.data.thinking import without_thinking
from atesd.evaluation.grading.answer_text import clean, same_answer
from atesd.evaluation.grading.worker import MEMORY_LIMIT
from atesd.packages import require_packages

__all__ = ["Grader", "Verdict", "grade"]

_LONGEST_ANSWER = 2_000  # characters; no real final answer is longer, and parsers are slow on longer ones
_TEXT_SEARCHED = 1_000  # characters searched at the end of a response without a box or marker
_START_LIMIT = 120.0  # seconds a worker may take to import math-verify on a busy machine


@dataclass(frozen=True)
class Verdict:
    """The verdict, the answer ``extracted`` from the response (``None`` if there is none), and the ``reason``:
    "equal", "different", "no answer", "answer too long", "cannot read the answer", "time limit", "memory limit", ...
    """

    correct: bool
    extracted: str | None
    reason: str


class Grader:
    r"""A pool of grading processes. A context manager. Thread-safe.

    Args:
        num_workers: processes (our choice: 2). They start with the first answer that needs one.
        time_limit: seconds per answer (our choice: 5). A slower answer counts as wrong, with reason "time limit".
        box_only: accept only the last ``\boxed{}``, as the papers do. By default the answer may also be on a ``####``
            line; without box and line, it is the last expression near the end of the response, as in math-verify.
            A response that was cut off has only its box, if that closes: a line or expression may go on after the cut.

    math-verify decides if the answers are neither equal as text nor both plain numbers. It treats a decimal and an
    exact value as equal if they agree to six decimals.

    Example::

        with Grader() as grader:
            verdicts = grader.grade_many([r"... so \boxed{\frac{2}{4}}", "I give up"], [r"\frac12", "7"])
            [v.correct for v in verdicts]   # [True, False]

    Raises MissingPackageError (an ImportError) when math-verify is not installed.
    """

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0, box_only: bool = False):
        if num_workers < 1 or not time_limit > 0:
            raise ValueError(f"num_workers and time_limit must be positive, got {num_workers} and {time_limit}")
        require_packages("grading", "math_verify")
        self.num_workers, self.time_limit, self.box_only = num_workers, time_limit, box_only
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the worker processes. The next grading starts new ones."""
        with self._lock:
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def grade(self, prediction_text: str, answer: str) -> Verdict:
        """Grades one response against the reference answer."""
        return self.grade_many([prediction_text], [answer])[0]

    def grade_many(
        self, prediction_texts: Sequence[str], answers: Sequence[str], cut_off: Sequence[bool] | None = None
    ) -> list[Verdict]:
        """Grades each response against the answer at the same index. Returns verdicts in that order.

        Args:
            cut_off: whether each response ended before its end token, as at the length limit; absent: none did.
        """
        cut_off = [False] * len(answers) if cut_off is None else cut_off
        if not len(prediction_texts) == len(answers) == len(cut_off):
            raise ValueError(f"{len(prediction_texts)} predictions, {len(answers)} answers, {len(cut_off)} cut_off")
        verdicts: list[Verdict | None] = []
        waiting: deque[tuple[int, dict[str, Any]]] = deque()
        for index, (text, answer, cut) in enumerate(zip(prediction_texts, answers, cut_off, strict=True)):
            decided = self._decide_by_text(text, final_answer(str(answer)) or str(answer), self.box_only or cut)
            verdicts.append(decided if isinstance(decided, Verdict) else None)
            if not isinstance(decided, Verdict):
                waiting.append((index, decided))
        if waiting:
            with self._lock:
                self._run(waiting, verdicts)
        return verdicts  # type: ignore[return-value]  # every entry is filled by now

    def _decide_by_text(self, text: str, gold: str, box_only: bool) -> Verdict | dict[str, Any]:
        """Returns a verdict if text and numbers decide, else the request to send to a worker."""
        text = without_thinking(text)
        extracted = response_answer(text, box_only, has_parts="," in gold)
        if extracted is None:
            # An unclosed box is a truncated answer: do not grade its visible part.
            if box_only or has_box(text) or not text.strip():
                return Verdict(False, None, "no answer")
            return {"gold": clean(gold), "target": text[-_TEXT_SEARCHED:], "whole_text": True}
        if len(extracted) > _LONGEST_ANSWER:
            return Verdict(extracted == gold, extracted[:200], "equal" if extracted == gold else "answer too long")
        same = same_answer(gold, extracted)
        if same is not None:
            return Verdict(same, extracted, "equal" if same else "different")
        return {"gold": clean(gold), "target": clean(extracted), "whole_text": False}

    def _run(self, waiting: deque[tuple[int, dict[str, Any]]], verdicts: list[Verdict | None]) -> None:
        while len(self._workers) < min(self.num_workers, len(waiting)):
            self._workers.append(_Worker(self.time_limit))
        busy = 0
        try:
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker.idle:
                        worker.give(*waiting.popleft())
                        busy += 1
                self._wait()
                for worker in self._workers:
                    finished = worker.collect()
                    if finished is not None:
                        index, verdict = finished
                        verdicts[index] = verdict
                        busy -= 1
        except BaseException:  # after an interrupt, nobody collects the pending answers
            for worker in self._workers:
                worker.stop()
            self._workers = []
            raise

    def _wait(self) -> None:
        """Waits until a worker writes output or the earliest deadline passes."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ)
            selector.select(max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic()))


class _Worker:
    """One grading process. It is starting, idle, or busy with the answer at ``index`` until ``deadline``."""

    def __init__(self, time_limit: float):
        self.time_limit = time_limit
        self.start()

    def start(self) -> None:
        package_parent = str(Path(atesd.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from atesd.evaluation.grading.worker import serve; serve({self.time_limit!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C then reaches only the parent, which stops its workers
        )
        self.output = self.process.stdout
        self.received = b""
        self.ready = False
        self.index: int | None = None
        self.request: dict[str, Any] = {}
        self.deadline = time.monotonic() + _START_LIMIT

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None

    def give(self, index: int, request: dict[str, Any]) -> None:
        self.index, self.request = index, request
        self.deadline = time.monotonic() + self.time_limit
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process died: collect() sees its output closed

    def collect(self) -> tuple[int, Verdict] | None:
        """Returns `(index, verdict)` of a finished answer, or None. Restarts a process that is late or dead."""
        message, closed = self._read()
        index, late = self.index, time.monotonic() >= self.deadline
        if not self.ready:
            if message == {"ready": True}:
                self.ready, self.deadline = True, float("inf")
            elif message is not None or closed or late:
                self.stop()
                why = (message or {}).get("failed") or ("it took too long" if late else "it ended at once")
                raise RuntimeError(f"the grading process did not start: {why}")
            return None
        if message is not None:
            verdict = Verdict(message["correct"], message["extracted"], message["reason"])
            self.index, self.deadline = None, float("inf")
            if message["reason"] == MEMORY_LIMIT:
                self.restart()  # the worker exits after this reply, so it must not get the next answer
        elif late or closed:
            target = None if index is None or self.request["whole_text"] else self.request["target"]
            verdict = Verdict(False, target, "time limit" if late else "the grading process died")
            self.restart()
        else:
            return None
        return None if index is None else (index, verdict)

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # closing writes what `give` could not
            self.process.stdin.close()
        self.output.close()

    def _read(self) -> tuple[dict[str, Any] | None, bool]:
        """Returns `(message, closed)`: a complete message or None, and whether the process closed its output."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            if not selector.select(0):
                return None, False
        chunk = os.read(self.output.fileno(), 1 << 16)
        self.received += chunk
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None, not chunk
        self.received = rest
        return json.loads(line), False


_shared: Grader | None = None
_shared_lock = threading.Lock()


def grade(prediction_text: str, answer: str) -> Verdict:
    r"""Grades one response with a process-wide pool, which is stopped at exit.

    >>> grade(r"Half of it, so \boxed{\frac{2}{4}}.", "0.5").correct
    True
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Grader(num_workers=1)
            atexit.register(_shared.close)
    return _shared.grade(prediction_text, answer)
