"""The matrix products of a call of `linear_divergence` alone: all of them, and each by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atesd_kernels.backends import matmul
from bench.entrants import Inputs
from bench.timing import gpu_plan


@torch.no_grad()
def trained_products(x: Inputs) -> None:
    """S, D, dH and dW, the last added up in fp32."""
    difference = (x.teacher.float() - x.student.float()).to(x.student.dtype)
    weight_grad = torch.empty(x.weight.shape, device=x.weight.device)
    for rows in gpu_plan(x, trained=True).row_chunks(len(x.student)):
        matmul.logits(x.student[rows], x.weight, torch.float32)
        g = matmul.logits(difference[rows], x.weight, x.weight.dtype)
        matmul.hidden_grad(g, x.weight)
        matmul.add_weight_grad(weight_grad, g, x.student[rows], overwrite=rows.start == 0)


@torch.no_grad()
def one_by_one(x: Inputs, rows: int) -> dict[str, Callable[[], Tensor | None]]:
    """Each product over `rows` rows, and alternatives that this library does not use."""
    h, w, narrow = x.student[:rows], x.weight, x.weight.dtype
    offset = torch.zeros(rows, device=h.device)
    g = torch.empty(rows, len(w), dtype=narrow, device=h.device).normal_()
    wide = torch.zeros(w.shape, device=w.device)
    return {
        "S, fp32 out": partial(matmul.logits, h, w, torch.float32),
        "S, bf16 out": partial(matmul.logits, h, w, narrow),
        "D, with its offset": partial(matmul.logits, h, w, narrow, offset),
        "D, without": partial(matmul.logits, h, w, narrow),
        "dH": partial(matmul.hidden_grad, g, w),
        "dW, added in fp32": partial(matmul.add_weight_grad, wide, g, h),
        "dW, bf16 out": lambda: torch.mm(g.T, h),
    }
