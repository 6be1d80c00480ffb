"""The three matrix products of a linear loss, each on the fastest road that keeps its promised precision.

The losses want fp32 logits from low-precision operands. A GPU's GEMM can do that (`out_dtype`); on a CPU torch
rounds the result of a bf16 product to bf16, so the operands are widened block by block instead. Products in fp16, and
in bf16 where oneDNN has none for the processor, are slower on a CPU than in fp32, and less exact: `product_dtype`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .. import planning
from . import elementwise


class Workspace:
    """The blocks of a call that are written again and again, one for each use.

    On a CPU memory that is freed and allocated anew for every block costs as much as what is written there: the system
    clears each of its pages first. A GPU's allocator does not, and there nothing is held.
    """

    def __init__(self, device: torch.device):
        self.buffers: dict[str, Tensor] | None = {} if device.type == "cpu" else None

    def empty(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """A block for `use`, until it is asked for again; None where whoever asks shall allocate."""
        if self.buffers is None:
            return None
        numel = shape[0] * shape[1]
        buffer = self.buffers.get(use)
        if buffer is None or buffer.numel() < numel or buffer.dtype != dtype:
            buffer = self.buffers[use] = torch.empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)

    def cast(self, use: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in `dtype`, itself if it has that."""
        out = None if x.dtype == dtype else self.empty(use, tuple(x.shape), dtype)
        return x.to(dtype) if out is None else out.copy_(x)


def logits(
    h: Tensor,
    w: Tensor,
    out_dtype: torch.dtype,
    offset: Tensor | None = None,
    work: Workspace | None = None,
    use: str = "logits",
) -> Tensor:
    """`h @ w.T + offset[:, None]` with `h` `[R, H]`, `w` `[C, H]` of one dtype, rounded once, to `out_dtype`: `[R, C]`.

    `offset` `[R]` is itself rounded to `out_dtype`: it is for constants that cancel. The result lies in `work`, for
    `use`, where that has a place for it.
    """
    work = Workspace(h.device) if work is None else work
    if out_dtype == product_dtype(h.dtype, h.device) == h.dtype != torch.float32:
        out = work.empty(use, (len(h), len(w)), out_dtype)
        if offset is None:
            return torch.mm(h, w.T, out=out)
        # the GEMM adds it to its fp32 accumulator
        if h.is_cuda and planning.HAS_TRITON:
            filled = elementwise.filled_rows(offset, len(w), out_dtype)
            return torch.addmm(filled, h, w.T, out=filled)
        return torch.addmm(offset.to(out_dtype)[:, None].expand(len(h), len(w)), h, w.T, out=out)
    z = _wide_logits(h, w, torch.promote_types(out_dtype, torch.float32), work, use)
    return (z if offset is None else z.add_(offset[:, None])).to(out_dtype)


def _wide_logits(h: Tensor, w: Tensor, out_dtype: torch.dtype, work: Workspace, use: str) -> Tensor:
    if out_dtype == torch.float64:
        return torch.mm(h.double(), w.double().T)
    if h.dtype != torch.float32 and h.is_cuda:
        return torch.mm(h, w.T, out_dtype=out_dtype)
    out, rounded = work.empty(use, (len(h), len(w)), torch.float32), h.dtype == torch.bfloat16
    h, w = h.float(), work.cast("widened head", w, torch.float32)
    if rounded and _BF16_TILES:
        with low_precision_products():
            return torch.mm(h, w.T, out=out)
    return _linear_fp32(h, w, out)


def hidden_grad(g: Tensor, w: Tensor) -> Tensor:
    """`g @ w` with `g` `[R, C]`, `w` `[C, H]`: `[R, H]`, in the `product_dtype` of `g`."""
    dtype = product_dtype(g.dtype, g.device)
    g, w = g.to(dtype), w.to(dtype)
    return _linear_fp32(g, w.T) if g.dtype == torch.float32 else torch.mm(g, w)


def add_weight_grad(acc: Tensor, g: Tensor, h: Tensor, overwrite: bool = False) -> None:
    """`acc += g.T @ h` with `acc` `[C, H]` in fp32 or fp64; with `overwrite`, `acc = g.T @ h` in any dtype."""
    dtype = product_dtype(g.dtype, g.device)
    g, h = g.to(dtype), h.to(dtype)
    if g.is_cuda and g.dtype != acc.dtype:
        # in the GEMM: a product of its own would be one more tensor of the head's size, written and read
        if overwrite:
            torch.mm(g.T, h, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, g.T, h, out_dtype=acc.dtype, out=acc)
        return
    if overwrite and g.dtype == acc.dtype != torch.float32:
        torch.mm(g.T, h, out=acc)
        return
    product = _linear_fp32(g.T, h.T) if g.dtype == torch.float32 else torch.mm(g.T, h)
    if overwrite:
        acc.copy_(product)
    else:
        acc.add_(product)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of `dtype` are multiplied in on `device`: themselves, or fp32 where that is the faster."""
    narrow = dtype == torch.float16 or (dtype == torch.bfloat16 and not _BF16_PRODUCTS)
    return torch.float32 if narrow and device.type == "cpu" else dtype


def _linear_fp32(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ w.T` in full fp32: no TF32 on a GPU; on a CPU through oneDNN where torch.mm's own GEMM is slower."""
    if x.is_cuda:
        previous = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            return torch.mm(x, w.T, out=out)
        finally:
            torch.backends.cuda.matmul.fp32_precision = previous
    if out is not None and onednn_keeps_fp32():  # the other way to oneDNN allocates what it returns
        with low_precision_products():
            return torch.mm(x, w.T, out=out)
    if _ONEDNN_FP32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.T, out=out)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# With AVX-512 oneDNN's fp32 GEMM beats torch.mm's on AMD (bench/loss_speed.py); with AVX2 it is slower at g @ w.
_ONEDNN_FP32 = _ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()
_BF16_PRODUCTS = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Processors whose bf16 matrix unit multiplies fp32 operands that are bf16 numbers many times faster than fp32 ones are.
_BF16_TILES = _ONEDNN and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@contextmanager
def low_precision_products():
    """Let oneDNN multiply fp32 operands as bf16: exact where they were widened from bf16."""
    previous = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = previous


@cache
def onednn_keeps_fp32() -> bool:
    """Whether oneDNN multiplies fp32 with AVX-512, and in fp32 even where it is allowed to round: tried, since it does
    round on processors with bf16 tiles."""
    if not _ONEDNN_FP32:
        return False
    x, w = torch.rand(2, 256, 576, generator=torch.Generator().manual_seed(0))
    with low_precision_products(), torch.autocast("cpu", enabled=False):
        error = torch.dist(torch.mm(x, w.T).double(), torch.mm(x.double(), w.double().T))
    return bool(error < 1e-5 * torch.mm(x, w.T).norm())  # products of rounded factors: 1e-3
