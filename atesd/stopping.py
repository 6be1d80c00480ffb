"""Ctrl-C and SIGTERM end a run after the step under way, when it can be saved; and the command that goes on.

So does the end of whoever reads its output: Ctrl-C in `atesd train my_run.yaml | tee log` ends tee as well.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from atesd.terminal import without_a_reader

ECHO = 1.0  # seconds


def go_on_command(run_dir: str | os.PathLike[str]) -> str:
    return f"atesd train --resume {shlex.quote(str(run_dir))}"


class Stopped(KeyboardInterrupt):
    """A signal ended the run, which is saved. `signal` is its number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, int]]:  # it may come from another process
        return type(self), (str(self), self.signal)


class Terminated(KeyboardInterrupt):
    """SIGTERM came outside a run's steps."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Context of a command: SIGTERM ends it as Ctrl-C does, so that what it has made is cleared or named.

    Where somebody else handles the signal, it is left alone.
    """
    here = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if here:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def exit_code(stop: KeyboardInterrupt) -> int:
    """Returns 128 and the number of the signal, as shells have it."""
    if isinstance(stop, Stopped):
        return 128 + stop.signal
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


class StopSignals:
    """Counts the signals that ask the run to end. A second one interrupts at once, without saving.

    Attributes:
        received: the number of the signal; SIGPIPE if nobody reads the output any more; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a first signal is only noted. Python handles signals in the main thread; elsewhere this is a no-op.

        A signal that the process ignores (as under nohup) stays ignored.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: the handler is not Python's
                    before[number] = signal.signal(number, self.note)
        without_a_reader.append(self.note_unread)
        try:
            yield
        finally:
            without_a_reader.pop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self.received_at < ECHO:
                return  # one wish to stop, told to a group of processes and passed on by one of them
            raise KeyboardInterrupt
        self.received, self.received_at = number, now
        text = f"\n{signal.Signals(number).name}: ends after this step, which is saved; once more to end at once\n"
        with suppress(OSError):  # the reader may have got the same signal, and left
            os.write(2, text.encode())  # print is not safe here: it may be what the signal has interrupted

    def note_unread(self) -> None:
        self.received = self.received or signal.SIGPIPE
