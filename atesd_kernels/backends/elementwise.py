"""Launchers of `kernels/elementwise.py`. Separate from it, for this file can be imported without Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

BLOCK = 4096


def on(device: torch.device):
    """The device a kernel is launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def filled_rows(values: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`[R, columns]` with `values[i]` in row i. On an H200 0.06 ms for 1,024 rows of 128,256, where torch's
    copy of an expanded tensor takes 0.22."""
    from ..kernels.elementwise import fill_rows

    out = torch.empty(len(values), columns, dtype=dtype, device=values.device)
    if out.numel():
        with on(out.device):
            grid = (len(values), -(-columns // BLOCK))
            fill_rows[grid](out, values, out.stride(0), columns, BLOCK=BLOCK, num_warps=8)
    return out


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x *= factor` in fp32, for a contiguous `x` and one number on its device. Nothing is written if that is 1."""
    from ..kernels.elementwise import scale

    if x.numel():
        with on(x.device):
            scale[(-(-x.numel() // BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
    return x
