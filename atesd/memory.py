"""Gives freed memory back to the operating system. Separate because it is about the C library, not about training."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc only
    except (AttributeError, OSError, TypeError):
        return None


def release_freed_memory() -> None:
    """Return the heap's free pages, where the C library is glibc; nothing elsewhere.

    glibc keeps what a phase has freed, and the next phase, which frees and allocates other sizes, grows the heap beside
    it: without this the peak of a CPU step is the sum of its phases' peaks rather than the largest of them.
    """
    trim = malloc_trim()
    if trim is not None:
        trim(0)
