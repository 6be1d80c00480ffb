"""Controls how glibc treats freed memory, and how many compiled matmuls oneDNN and torch cache.

glibc either returns a freed tensor to the operating system, or keeps it in a heap. Both have a cost. Returned pages are
zeroed one by one on reuse, which takes time. Kept pages are unavailable to other phases, and the heap grows when the
next phase needs other sizes.
"""

from __future__ import annotations

import ctypes
import functools
import os

# mallopt(3) options and values: tensors below 1 GiB come from the heap (not mmap), and the heap is never trimmed.
M_TRIM_THRESHOLD, KEEP_ALL = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_IN_HEAP = -3, 2**30


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc, recognised by `mallopt` and `malloc_trim`; None otherwise."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except (OSError, TypeError):
        return None


class FreedMemory:
    """Keeps freed CPU memory in the process, or returns it to the operating system after each phase of a step.

    Args:
        keep: True is faster. False limits the peak memory of a CPU step to that of its largest phase. Both are no-ops
            without glibc, and neither affects GPU memory.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        if keep and (library := glibc()):
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
            library.mallopt(M_TRIM_THRESHOLD, KEEP_ALL)

    def release(self) -> None:
        """Returns the heap's free pages to the operating system, unless `keep`. Call it at the end of a phase."""
        if not self.keep and (library := glibc()):
            library.malloc_trim(0)


def bound_product_caches() -> None:
    """Limits the matmul caches of oneDNN and of torch's layer over it. Call before the first matmul: both read it once.

    By default each caches compiled code for the last 1,024 matmul shapes. Sequence lengths differ in every micro-batch,
    so old entries are never reused, and memory of a CPU run would grow for many steps. One micro-batch has a few dozen
    different matmul shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
