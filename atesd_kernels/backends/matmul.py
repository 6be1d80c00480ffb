"""The three GEMMs of a linear loss. Each takes the fastest path that keeps its documented precision.

The losses need fp32 logits from low-precision operands. A GPU's GEMM provides that (`out_dtype`). On a CPU torch
rounds the result of a bf16 product to bf16. Backend "cpp" has products of its own there, with fp32 results
(`cpp/product.cpp`); without it the operands are widened block by block. A CPU multiplies fp16 slower and less exactly
than fp32; so it does bf16 where oneDNN has no kernel for the processor (see `product_dtype`).
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .. import planning
from ..cpp import library
from . import elementwise
from .workspace import Workspace


def logits(
    h: Tensor,
    w: Tensor,
    out_dtype: torch.dtype,
    offset: Tensor | None = None,
    work: Workspace | None = None,
    use: str = "logits",
) -> Tensor:
    """Returns `h @ w.T + offset[:, None]`, `[R, C]`, rounded once, to `out_dtype`.

    `h` `[R, H]` and `w` `[C, H]` have one dtype. `offset` `[R]` is itself rounded to `out_dtype`: use it for constants
    that cancel. On a CPU the result may lie in the buffer of `work` for `use`.
    """
    work = Workspace(h.device) if work is None else work
    if out_dtype == product_dtype(h.dtype, h.device) == h.dtype != torch.float32:
        out = work.empty(use, (len(h), len(w)), out_dtype)
        if offset is None:
            return torch.mm(h, w.T, out=out)
        # the GEMM adds the offset to its fp32 accumulator
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
    if rounded and work.in_cpp and out is not None and multiplies_bf16(h.shape[1]):
        return library.product(h, w, out)
    h, w = h.float(), work.cast("widened head", w, torch.float32)
    if rounded and _BF16_TILES:
        with low_precision_products():
            return torch.mm(h, w.T, out=out)
    return _linear_fp32(h, w, out)


def hidden_grad(g: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Returns `g @ w`, `[R, H]`, in the `product_dtype` of `g` or in `out_dtype`. `g` is `[R, C]`, `w` is `[C, H]`."""
    if out_dtype is not None:
        return logits(g, w.T, out_dtype)
    dtype = product_dtype(g.dtype, g.device)
    g, w = g.to(dtype), w.to(dtype)
    return _linear_fp32(g, w.T) if g.dtype == torch.float32 else torch.mm(g, w)


def add_hidden_grad(acc: Tensor, g: Tensor, w: Tensor, work: Workspace) -> None:
    """Adds `g @ w` to `acc` `[R, H]` (fp32 or fp64) in place. `g` is `[R, C]`, `w` is `[C, H]`."""
    bf16 = g.dtype == w.dtype == torch.bfloat16 and acc.dtype == torch.float32
    if bf16 and work.in_cpp and multiplies_bf16(2):  # the width may be odd
        packed = work.empty("packed rows of the head", (library.packed_rows(len(w)), w.shape[1]), w.dtype)
        library.add_product(g, w, acc, packed)
    else:
        acc += hidden_grad(g, w)


def add_weight_grad(acc: Tensor, g: Tensor, h: Tensor, overwrite: bool = False) -> None:
    """Adds `g.T @ h` to `acc` `[C, H]` (fp32 or fp64) in place; with `overwrite`, stores it there, in any dtype."""
    dtype = product_dtype(g.dtype, g.device)
    g, h = g.to(dtype), h.to(dtype)
    if g.is_cuda and g.dtype != acc.dtype:
        # the GEMM accumulates: a separate product would write and read one more tensor of the head's size
        if overwrite:
            torch.mm(g.T, h, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, g.T, h, out_dtype=acc.dtype, out=acc)
        return
    if overwrite and g.dtype == acc.dtype != torch.float32:
        torch.mm(g.T, h, out=acc)
        return
    if g.dtype == acc.dtype == torch.float32:
        add_fp32(acc, g.T, h.T, overwrite)
        return
    product = _linear_fp32(g.T, h.T) if g.dtype == torch.float32 else torch.mm(g.T, h)
    if overwrite:
        acc.copy_(product)
    else:
        acc.add_(product)


def add_fp32(acc: Tensor, x: Tensor, w: Tensor, overwrite: bool = False) -> None:
    """Adds `x @ w.T` to `acc` in place, all in full fp32; with `overwrite`, stores it there."""
    if x.device.type == "cpu" and onednn_keeps_fp32():
        with low_precision_products():
            if overwrite:
                torch.mm(x, w.T, out=acc)
            else:
                torch.addmm(acc, x, w.T, out=acc)
    elif overwrite:
        acc.copy_(_linear_fp32(x, w))
    else:
        acc.add_(_linear_fp32(x, w))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which `device` multiplies operands of `dtype`: fp32 if that is faster, else `dtype`."""
    narrow = dtype == torch.float16 or (dtype == torch.bfloat16 and not _BF16_PRODUCTS)
    return torch.float32 if narrow and device.type == "cpu" else dtype


def _linear_fp32(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns `x @ w.T` in full fp32: without TF32 on a GPU; through oneDNN on a CPU where torch.mm is slower."""
    if x.is_cuda:
        previous = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            return torch.mm(x, w.T, out=out)
        finally:
            torch.backends.cuda.matmul.fp32_precision = previous
    if out is not None and onednn_keeps_fp32():  # the other call of oneDNN, below, allocates its result
        with low_precision_products():
            return torch.mm(x, w.T, out=out)
    if _ONEDNN_FP32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.T, out=out)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# With AVX-512 oneDNN's fp32 GEMM beats torch.mm's on AMD (bench/loss_speed.py); with AVX2 it is slower at g @ w.
_ONEDNN_FP32 = _ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()
_BF16_PRODUCTS = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Processors with a bf16 matrix unit: it multiplies fp32 operands that hold bf16 values many times faster than fp32.
_BF16_TILES = _ONEDNN and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def writes_in_place(dtype: torch.dtype, k: int) -> bool:
    """Whether a product of matrices of `dtype` writes fp32 logits where they are wanted, without a temporary."""
    if dtype == torch.float32:
        return onednn_keeps_fp32() or not _ONEDNN_FP32
    return dtype == torch.bfloat16 and multiplies_bf16(k)


def multiplies_bf16(k: int) -> bool:
    """Whether C++ multiplies bf16 matrices of `k` common entries to fp32 on this processor."""
    enabled = torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
    return _BF16_PRODUCTS and enabled and k % 2 == 0 and library.product_library() is not None


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its own layout for matrices of `dtype` on this processor (`_reorder_linear_weight`)."""
    packs = _ONEDNN and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return packs and (dtype != torch.bfloat16 or _BF16_PRODUCTS)


@contextmanager
def low_precision_products():
    """Lets oneDNN multiply fp32 operands as bf16. This is exact if they were widened from bf16."""
    previous = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = previous


@cache
def onednn_keeps_fp32() -> bool:
    """Whether oneDNN has AVX-512 and stays in fp32 even if allowed to round. Measured, because it does round on
    processors with bf16 tiles."""
    if not _ONEDNN_FP32:
        return False
    x, w = torch.rand(2, 256, 576, generator=torch.Generator().manual_seed(0))
    with low_precision_products(), torch.autocast("cpu", enabled=False):
        error = torch.dist(torch.mm(x, w.T).double(), torch.mm(x.double(), w.double().T))
    return bool(error < 1e-5 * torch.mm(x, w.T).norm())  # rounded factors give 1e-3
