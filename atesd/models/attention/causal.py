"""Causal attention of one short sequence in float32, for CPUs on which oneDNN multiplies faster than torch's kernel.

torch's fused kernel works in small blocks and skips the masked half of the scores. Whole products compute that half
too. Yet in a training step on AMD with AVX-512 they are faster up to `LONGEST` tokens (`bench/attention_speed.py`).
Nothing of the scores' size is kept for backward, which computes them again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from atesd_kernels.backends import matmul

LONGEST = 512  # tokens of a sequence; our choice
SCORE_BYTES = 8 << 20  # of the key heads that are computed together


@torch.library.custom_op("atesd::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`softmax(query key^T scaling + causal mask) value` for each head, in full float32.

    An operator, so that selective recomputation (`recompute.py`) keeps its output as it keeps that of torch's kernels.
    So is its backward: what is traced holds no tensor that `longest_mask` would keep.

    Shapes: `query` `(1, heads, T, head_dim)`; `key` and `value` `(1, groups, T, head_dim)`, where `groups` divides
    `heads` and the head dimension of `value` may be another. Returns `(1, heads, T, head_dim of value)`.
    """
    rows, keys, values = rows_of(query, key).mul(scaling), rows_of(key, key), rows_of(value, key)
    out, mask = rows.new_empty(*rows.shape[:2], value.shape[-1]), causal_mask(keys.shape[1])
    with matmul.low_precision_products():
        for part in parts(rows, keys.shape[1]):
            torch.bmm(probabilities(rows[part], keys[part], mask), values[part], out=out[part])
    return out.view(*query.shape[:3], -1)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("atesd::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `query`, `key` and `value` from that of the output `out`."""
    rows, keys, values = rows_of(query, key).mul(scaling), rows_of(key, key), rows_of(value, key)
    of_out, mask = rows_of(of_out, key), causal_mask(keys.shape[1])
    mean = (of_out * rows_of(out, key)).sum(-1, keepdim=True)  # of the gradient of the probabilities
    of_rows, of_keys, of_values = (torch.empty_like(x) for x in (rows, keys, values))
    # a backward may be called inside autocast
    with matmul.low_precision_products(), torch.autocast("cpu", enabled=False):
        for part in parts(rows, keys.shape[1]):
            p = probabilities(rows[part], keys[part], mask)
            torch.bmm(p.mT, of_out[part], out=of_values[part])
            of_scores = torch.bmm(of_out[part], values[part].mT).sub_(mean[part]).mul_(p)
            torch.bmm(of_scores, keys[part], out=of_rows[part])
            torch.bmm(of_scores.mT, rows[part], out=of_keys[part])
    return of_rows.mul_(scaling).view(query.shape), of_keys[None], of_values[None]


@causal_attention_backward.register_fake
def _(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output)
    ctx.scaling = inputs[3]


def gradients(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(of_out, *ctx.saved_tensors, ctx.scaling), None


causal_attention.register_autograd(gradients, setup_context=keep)


def rows_of(heads: Tensor, key: Tensor) -> Tensor:
    """Returns `heads`, `(1, heads, T, dim)`, contiguous and by their key head: `(groups, heads of each * T, dim)`."""
    return heads.contiguous().view(key.shape[1], -1, heads.shape[-1])


def parts(rows: Tensor, length: int) -> list[slice]:
    """Returns slices of key heads whose scores fit in `SCORE_BYTES`, of at least one head each."""
    groups, count, _ = rows.shape
    together = max(1, SCORE_BYTES // (count * length * rows.element_size()))
    return [slice(start, start + together) for start in range(0, groups, together)]


def probabilities(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Returns `(groups, heads of each * T, T)` for rows and keys of some groups."""
    scores = torch.bmm(rows, keys.mT)
    scores.view(-1, *mask.shape).add_(mask)
    return scores.softmax(-1)


def causal_mask(length: int) -> Tensor:
    """Returns 0 up to the diagonal and -inf above it, `(length, length)`."""
    return longest_mask(max(length, LONGEST))[:length, :length]


@cache
def longest_mask(length: int) -> Tensor:
    return torch.full((length, length), -torch.inf).triu_(1)


def serves(query: Tensor, options: dict[str, Any]) -> bool:
    """Whether `causal_attention` takes these states with the sdpa `options`, and they are short."""
    return (
        query.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[2] <= LONGEST
        and not options.get("dropout")
        and options.get("position_bias") is None
        and matmul.onednn_keeps_fp32()
    )
