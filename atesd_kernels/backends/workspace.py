"""Memory for the tensors of a chunk."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor


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
            buffer = self.buffers[use] = torch.empty(numel, dtype=dtype)
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
