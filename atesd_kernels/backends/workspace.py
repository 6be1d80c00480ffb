"""Memory for the tensors of a chunk."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes; x86, and ARM with pages of 4 KiB


class Workspace:
    """Reuses one buffer per use for all blocks of a call, on a CPU.

    Allocating each block on a CPU costs as much as writing it: the system clears every page first. A GPU's allocator
    does not clear, so there the workspace keeps no buffers.
    """

    def __init__(self, device: torch.device, in_cpp: bool = False):
        self.buffers: dict[str, Tensor] | None = {} if device.type == "cpu" else None
        self.in_cpp = in_cpp  # whether bf16 products may come from C++
        self.lent: dict[str, Tensor] = {}  # by use: where the next result is wanted, for results of its shape and dtype

    def empty(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Returns the buffer for `use`, valid until the next call for that use; on a GPU None: allocate it yourself."""
        if self.buffers is None:
            return None
        lent = self.lent.get(use)
        if lent is not None and lent.shape == shape and lent.dtype == dtype:
            return lent
        numel = shape[0] * shape[1]
        buffer = self.buffers.get(use)
        if buffer is None or buffer.numel() < numel or buffer.dtype != dtype:
            buffer = self.buffers[use] = new(numel, dtype, torch.device("cpu"))
        return buffer[:numel].view(shape)

    def forget(self, *uses: str) -> None:
        """Frees the buffers for `uses`, or all."""
        for use in uses or tuple(self.buffers or ()):
            (self.buffers or {}).pop(use, None)

    @contextmanager
    def lending(self, **places: Tensor):
        """Lets the next results for these uses be written where they are wanted."""
        self.lent = places
        try:
            yield
        finally:
            self.lent = {}

    def cast(self, use: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns `x` in `dtype`; `x` itself if it already has that dtype."""
        out = None if x.dtype == dtype else self.empty(use, tuple(x.shape), dtype)
        return x.to(dtype) if out is None else out.copy_(x)


def new(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised vector, for a large one on a CPU in huge pages if the system grants them.

    The system clears each page before a call may use it: 100 MiB take 25 ms in pages of 4 KiB and 5 ms in huge ones
    (AMD EPYC, Linux). It grants them if /sys/kernel/mm/transparent_hugepage/enabled is "madvise" or "always".
    """
    x = torch.empty(numel, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= 2 * HUGE_PAGE and (advise := _madvise()):
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, x.data_ptr() + x.nbytes - start, mmap.MADV_HUGEPAGE)  # a refusal changes nothing
    return x


@cache
def _madvise():
    """Returns madvise(2) where it knows huge pages, else None."""
    try:
        found = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    except (OSError, TypeError):
        return None
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
