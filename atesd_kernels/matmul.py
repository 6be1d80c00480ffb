"""The three matrix products of a linear loss, each on the fastest road that keeps its promised precision.

The losses want fp32 logits from low-precision operands. A GPU's GEMM can do that (`out_dtype`); on a CPU torch
rounds the result of a bf16 product to bf16, so the operands are widened block by block instead. Products in fp16, and
in bf16 where oneDNN has none for the processor, are slower on a CPU than in fp32, and less exact: `product_dtype`.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor


def logits(h: Tensor, w: Tensor, out_dtype: torch.dtype, offset: Tensor | None = None) -> Tensor:
    """`h @ w.T + offset[:, None]` with `h` `[R, H]`, `w` `[C, H]` of one dtype, rounded once, to `out_dtype`: `[R, C]`.

    `offset` `[R]` is itself rounded to `out_dtype`: it is for constants that cancel.
    """
    if out_dtype == product_dtype(h.dtype, h.device) == h.dtype != torch.float32:
        if offset is None:
            return torch.mm(h, w.T)
        # the GEMM adds it to its fp32 accumulator
        return torch.addmm(offset.to(out_dtype)[:, None].expand(len(h), len(w)), h, w.T)
    z = _wide_logits(h, w, torch.promote_types(out_dtype, torch.float32))
    return (z if offset is None else z.add_(offset[:, None])).to(out_dtype)


def _wide_logits(h: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.float64:
        return torch.mm(h.double(), w.double().T)
    if h.dtype == torch.float32:
        return _linear_fp32(h, w)
    if h.is_cuda:
        return torch.mm(h, w.T, out_dtype=out_dtype)
    if h.dtype != torch.bfloat16 or not _BF16_TILES:
        return _linear_fp32(h.float(), w.float())
    with low_precision_products():
        return torch.mm(h.float(), w.float().T)


def hidden_grad(g: Tensor, w: Tensor) -> Tensor:
    """`g @ w` with `g` `[R, C]`, `w` `[C, H]`: `[R, H]`, in the `product_dtype` of `g`."""
    dtype = product_dtype(g.dtype, g.device)
    g, w = g.to(dtype), w.to(dtype)
    return _linear_fp32(g, w.T) if g.dtype == torch.float32 else torch.mm(g, w)


def add_weight_grad(acc: Tensor, g: Tensor, h: Tensor) -> None:
    """`acc += g.T @ h` with `acc` `[C, H]` in fp32 or fp64."""
    dtype = product_dtype(g.dtype, g.device)
    g, h = g.to(dtype), h.to(dtype)
    if g.is_cuda and g.dtype != acc.dtype:
        # in the GEMM: a product of its own would be one more tensor of the head's size, written and read
        torch.addmm(acc, g.T, h, out_dtype=acc.dtype, out=acc)
    elif g.dtype == torch.float32:
        acc.add_(_linear_fp32(g.T, h.T))
    else:
        acc.add_(torch.mm(g.T, h))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of `dtype` are multiplied in on `device`: themselves, or fp32 where that is the faster."""
    narrow = dtype == torch.float16 or (dtype == torch.bfloat16 and not _BF16_PRODUCTS)
    return torch.float32 if narrow and device.type == "cpu" else dtype


def _linear_fp32(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` in full fp32: no TF32 on a GPU; on a CPU through oneDNN where torch.mm's own GEMM is slower."""
    if x.is_cuda:
        previous = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            return torch.mm(x, w.T)
        finally:
            torch.backends.cuda.matmul.fp32_precision = previous
    if _ONEDNN_FP32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.T)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# With AVX-512 oneDNN's fp32 GEMM beats torch.mm's by a fifth on AMD; with AVX2 it is a third slower at g @ w.
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
