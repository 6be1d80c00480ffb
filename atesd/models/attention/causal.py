"""Causal attention of one short sequence in float32, for CPUs on which oneDNN multiplies faster than torch's kernel.

A block of query positions is multiplied with all the keys that its last position sees, so some masked scores are
computed. Yet forward and backward of a training step are faster on AMD with AVX-512 (`bench/attention_speed.py`).
Backward computes the scores again: none are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from atesd_kernels.backends import matmul

LONGEST = 1024  # tokens of a sequence; our choice: forward alone is slower from 768 on
BLOCK = 128  # query positions; the last block has up to 1.5 times as many; our choice
SCORE_BYTES = 8 << 20  # of the key heads that are computed together


@torch.library.custom_op("atesd::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`softmax(query key^T scaling + causal mask) value` for each head, in full float32.

    An operator, so that selective recomputation (`recompute.py`) keeps its output as it keeps that of torch's kernels.
    So is its backward: what is traced holds no tensor that `largest_mask` would keep.

    Shapes: `query` `(1, heads, T, head_dim)`; `key` and `value` `(1, groups, T, head_dim)`, where `groups` divides
    `heads` and the head dimension of `value` may be another. Returns `(1, heads, T, head_dim of value)`.
    """
    rows, keys, values = by_group(query, key).mul(scaling), key[0], value[0]
    out = rows.new_empty(*rows.shape[:3], value.shape[-1])
    with matmul.low_precision_products():
        for heads, queries, seen in blocks(rows):
            p = probabilities(flat(rows[heads, :, queries]), keys[heads, :seen], queries)
            out[heads, :, queries] = torch.bmm(p, values[heads, :seen]).view_as(out[heads, :, queries])
    return out.view(*query.shape[:3], -1)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("atesd::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `query`, `key` and `value` from that of the output `out`."""
    rows, keys, values, of_out = by_group(query, key).mul(scaling), key[0], value[0], by_group(of_out, key)
    mean = (of_out * by_group(out, key)).sum(-1, keepdim=True)  # of the gradient of the probabilities
    of_rows, of_keys, of_values = rows.new_empty(rows.shape), keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    # a backward may be called inside autocast
    with matmul.low_precision_products(), torch.autocast("cpu", enabled=False):
        for heads, queries, seen in blocks(rows):
            q, g = flat(rows[heads, :, queries]), flat(of_out[heads, :, queries])
            k, v = keys[heads, :seen], values[heads, :seen]
            p = probabilities(q, k, queries)
            of_values[heads, :seen].baddbmm_(p.mT, g)
            of_scores = torch.bmm(g, v.mT).sub_(flat(mean[heads, :, queries])).mul_(p)
            of_rows[heads, :, queries] = torch.bmm(of_scores, k).view_as(of_rows[heads, :, queries])
            of_keys[heads, :seen].baddbmm_(of_scores.mT, q)
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


def by_group(heads: Tensor, key: Tensor) -> Tensor:
    """Returns `heads`, `(1, heads, T, dim)`, by their key head: `(groups, heads of each, T, dim)`."""
    return heads.view(key.shape[1], -1, *heads.shape[2:])


def flat(heads: Tensor) -> Tensor:
    """Returns `(groups, heads of each, rows, dim)` as one matrix a group, `(groups, heads of each * rows, dim)`."""
    return heads.reshape(len(heads), -1, heads.shape[-1])


def blocks(rows: Tensor) -> list[tuple[slice, slice, int]]:
    """Returns key heads, query positions, and the number of keys these see, for each block of scores."""
    groups, count, length, _ = rows.shape
    starts = list(range(0, max(1, length - BLOCK // 2), BLOCK))  # the last block takes a small remainder
    found = []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        together = max(1, SCORE_BYTES // (count * (end - start) * end * rows.element_size()))
        found += [(slice(g, g + together), slice(start, end), end) for g in range(0, groups, together)]
    return found


def probabilities(rows: Tensor, keys: Tensor, queries: slice) -> Tensor:
    """Softmax over the keys up to `queries.stop` for `rows`, those of the positions `queries`.

    Returns `(groups, heads of each * queries, keys)`.
    """
    scores = torch.bmm(rows, keys.mT)
    count = queries.stop - queries.start
    scores.view(-1, count, queries.stop)[:, :, queries].add_(largest_mask()[:count, :count])
    return scores.softmax(-1)


@cache
def largest_mask() -> Tensor:
    """Returns 0 up to the diagonal and -inf above it, for the positions of the largest block."""
    size = BLOCK + BLOCK // 2
    return torch.full((size, size), -torch.inf).triu_(1)


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
