"""Backend "triton" of `exposure_logprobs` without gradients. It never writes logits to memory.

A kernel visits tiles of rows by vocabulary and keeps running statistics. Tiles contain unmasked tokens only, so a
masked token costs neither a product nor a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import logprobs as logprob_kernels
from ..kernels import tiles as tile_kernels
from ..spec import LogprobSpec
from . import tuning
from .elementwise import on
from .tuning import TileConfig


def exposure_means(
    spec: LogprobSpec,
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [B, T]
    lengths: Tensor,  # [B]
    exposed: Tensor,  # [B]
    mask: Tensor,  # [B, T] bool: exposed <= i < length
) -> Tensor:
    """Returns the mean log-probability of each sequence's tokens after its exposed prefix, `[B]`. No gradient."""
    num_sequences, length = targets.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = row_logprobs(spec, flat, weight, bias, targets.reshape(-1), mask.reshape(-1))
    means = torch.zeros(num_sequences, device=hidden.device)
    if num_sequences and length:
        with on(hidden.device):
            logprob_kernels.span_mean[(num_sequences,)](out, lengths, exposed, means, length, BLOCK=1024)
    return means


def row_logprobs(
    spec: LogprobSpec,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    mask: Tensor,  # [N] bool
) -> Tensor:
    """Returns log-probability, entropy, confidence and lse of each unmasked row, `[N, 4]` fp32; 0 in masked rows."""
    dtype, device = spec.compute_dtype, hidden.device
    h, w = unit_stride(hidden.to(dtype)), unit_stride(weight.to(dtype))
    (num_rows, size), vocab = h.shape, w.shape[0]
    out = torch.zeros(num_rows, logprob_kernels.NUM_LOGPROB_OUT.value, device=device)
    if num_rows == 0:
        return out
    row, count = counted_rows(mask)
    inv_t = 1 / spec.temperature
    config = tuning.tile_config(device, dtype)
    splits = tuning.tile_splits(num_rows, vocab, config, device)
    parts = torch.zeros(num_rows, splits, logprob_kernels.NUM_LOGPROB_PARTS.value, device=device)
    head, stride = head_operand(w, config)
    with on(device):
        tile_kernels.tile_scores[(-(-num_rows // config.block_m), splits)](
            h, head, bias, row, count, targets, parts, h.stride(0), stride, vocab, size, inv_t, spec.softcap,
            PRECISION="ieee", **config.constants,
        )  # fmt: skip
        logprob_kernels.finish_logprob[(num_rows, 1)](
            h, h, bias, mask, targets, None, parts, out, 0, 0, vocab, inv_t, spec.softcap, 1.0, GRAD=False,
            SPLITS=splits, BLOCK=1024,
        )  # fmt: skip
    return out


def unit_stride(x: Tensor) -> Tensor:
    """Returns `x` if its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def head_operand(w: Tensor, config: TileConfig) -> tuple[object, int | None]:
    """Returns the head `[V, H]` and its row stride for the kernel; with TMA, a tensor descriptor and None."""
    aligned = (w.stride(0) * w.itemsize) % 16 == 0 and w.data_ptr() % 16 == 0
    if not (config.tma and aligned):
        return w, w.stride(0)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]), None


def counted_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row indices `[N]`, unmasked rows first, and the number of those, `[1]`. Does not synchronise."""
    order = torch.argsort(mask.to(torch.uint8), descending=True, stable=True)
    return order.to(torch.int32), mask.sum(dtype=torch.int32).reshape(1)
