"""The terminal: text without control characters, and bars that move inside long phases.

File names, problems, servers and weights bring text of their own. An escape sequence in it could clear the screen or
hide a line, so everything that atesd shows passes `printable`. Nothing else in atesd calls `print`.
The reader of a pipe may leave, as `head` does: the command then ends without a word.
"""

from __future__ import annotations

import functools
import os
import select
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

# Characters that let text run backwards, so that a line shows other words than it holds.
TURNED = frozenset(map(chr, (0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
REFRESH_SECONDS, LOG_SECONDS = 0.2, 10.0


def printable(text: object) -> str:
    r"""Returns the text with control characters, lone surrogates and changes of direction written out.

    >>> printable("alpha\x1b[2Jbeta\n")
    'alpha\\x1b[2Jbeta\n'
    """
    return "".join(c if harmless(c) else c.encode("unicode_escape").decode() for c in str(text))


def harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    return character not in TURNED and unicodedata.category(character) not in ("Cc", "Cs")


def show(text: object, file: TextIO | None = None) -> None:
    """Prints text, above a progress bar where one is shown. It is flushed at once: a pipe may be read as it grows."""
    from tqdm import tqdm  # not at import: `atesd --help` answers at once

    with while_it_is_read(), tqdm.external_write_mode(file=file):
        print(printable(text), file=file or sys.stdout, flush=True)


@contextmanager
def while_it_is_read() -> Iterator[None]:
    """Ends the command with SystemExit(1) once the reader of its output has left: `atesd train --help | head -3`.

    SystemExit is no Exception: nothing on the way takes it for an error of a file or a model. A BrokenPipeError of
    another pipe or of a server passes through.
    """
    try:
        yield
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if reader_has_left(stream)]
        if not closed:
            raise
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # Python flushes them at exit, and would complain
            os.dup2(devnull, stream.fileno())
        os.close(devnull)
        without_a_reader[-1]()


def reader_has_left(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # 0: closed pipes are told without asking
    except (OSError, ValueError):  # no file of the system, as in a notebook
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def end_unread() -> None:
    raise SystemExit(1)  # what Python's documentation recommends for a closed pipe


# What to do once nobody reads, the innermost last. A run ends after its step, which is saved.
without_a_reader: list[Callable[[], None]] = [end_unread]


def one_line_messages() -> None:
    """From now on a warning takes one line, and a traceback that ends the process is printable."""
    warnings.formatwarning = lambda message, *where: f"atesd: warning: {printable(message)}\n"
    sys.excepthook = show_traceback


@contextmanager
def plain_messages() -> Iterator[None]:
    """Context of a command: `one_line_messages` within."""
    before = warnings.formatwarning
    one_line_messages()
    try:
        yield
    finally:
        warnings.formatwarning = before


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`, but printable."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


class Shown(threading.local):
    """The bars on the screen. A thread that works in the background has none.

    Attributes:
        steps: the bar of the run's steps.
        responses, phase: the bar that `advance` moves, and its name.
    """

    steps: Any = None
    responses: Any = None
    phase: str = ""


shown = Shown()


@functools.cache
def bar_class() -> Any:
    """tqdm's bar, whose reader may leave."""
    from tqdm import tqdm

    class Bar(tqdm):
        def display(self, *arguments: Any, **options: Any) -> Any:
            with while_it_is_read():
                return super().display(*arguments, **options)

    return Bar


def steps_bar(first: int, end: int, hidden: bool) -> Any:
    """Returns a bar that iterates over the steps from `first` on. `name_phase` writes into it."""
    shown.steps = bar_class()(range(first, end), initial=first, total=end, disable=hidden)
    return shown.steps


def name_phase(name: str) -> None:
    """Shows what the step is doing. Not in a log, where it would be a line each."""
    bar = shown.steps
    if bar is not None and not bar.disable and sys.stderr.isatty():
        bar.set_description(name.replace("_", " "))


@contextmanager
def progress(phase: str, total: int, *, done: int = 0, hidden: bool = False, in_logs: bool = False) -> Iterator[Any]:
    """Shows a bar for a phase of `total` responses, of which `done` are there. `advance` moves it.

    The bar is gone at the end. Where the output is no terminal, none is shown, unless `in_logs`.
    """
    terminal = sys.stderr.isatty()
    bar = bar_class()(
        total=total,
        initial=done,
        desc=phase,
        leave=in_logs,
        disable=hidden or not (terminal or in_logs),
        miniters=0,
        mininterval=REFRESH_SECONDS if terminal else LOG_SECONDS,
    )
    before = shown.responses, shown.phase
    shown.responses, shown.phase = bar, phase
    try:
        with bar:
            yield bar
    finally:
        shown.responses, shown.phase = before


def advance(responses: int = 0, note: str = "") -> None:
    """Counts finished responses in this thread's bar, if it has one. `note` stands beside the phase's name."""
    bar = shown.responses
    if bar is None or bar.disable:
        return
    if note:
        bar.set_description_str(f"{shown.phase}, {note}", refresh=False)
    bar.update(min(responses, bar.total - bar.n))  # a response that is asked for again counts once
