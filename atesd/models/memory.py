"""What becomes of freed memory, and of code that is not needed again. Separate because it is about libraries, not about
training.

glibc gives a freed tensor back to the operating system, or keeps it in a heap that grows when the next phase asks for
other sizes. Neither is free: pages given back are cleared one by one when they are used again, which takes time;
pages kept are memory that the other phases do not use.
"""

from __future__ import annotations

import ctypes
import functools
import os

# What mallopt(3) sets, and to what: no tensor below a GiB has pages of its own, and the heap's end stays.
M_TRIM_THRESHOLD, KEEP_ALL = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_IN_HEAP = -3, 2**30


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: `mallopt` and `malloc_trim` are its own."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except (OSError, TypeError):
        return None


class FreedMemory:
    """Keeps what is freed for the next tensors of this process, or gives it back after each phase of a step.

    Args:
        keep: faster; otherwise the peak of a CPU step is that of its largest phase. Nothing happens, either way, where
            the C library is not glibc, or to a GPU's memory.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        if keep and (library := glibc()):
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
            library.mallopt(M_TRIM_THRESHOLD, KEEP_ALL)

    def release(self) -> None:
        """At the end of a phase: return the heap's free pages, unless they are kept."""
        if not self.keep and (library := glibc()):
            library.malloc_trim(0)


def bound_product_caches() -> None:
    """Call before the first product: oneDNN, and torch's own layer over it, read these once.

    Each keeps the code it has compiled for its last 1,024 products. The sequences of every micro-batch have lengths of
    their own, whose code is of no use after it: on a CPU a run would grow for many steps. In one micro-batch there are
    a few dozen products of different shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
