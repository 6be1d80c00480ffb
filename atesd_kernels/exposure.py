"""Exposure spans: log-probabilities of a reference after the prefix that the teacher has in its context.

A teacher can copy the part of a reference solution that is in its context. Its score on the remaining tokens measures
whether the exposed prefix helps with the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .arguments import checked_logprobs, gradients_wanted
from .losses import linear_logprobs
from .shards import shard_of
from .spec import LogprobSpec
from .stats import TokenStats


def exposure_mask(lengths: Tensor, exposed: Tensor, max_length: int) -> Tensor:
    """Returns a mask `[B, max_length]`, true at tokens `exposed[b] <= i < lengths[b]`, on the tensors' device."""
    position = torch.arange(max_length, device=lengths.device)
    return (position >= exposed[:, None]) & (position < lengths[:, None])


def exposure_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lengths: Tensor,
    exposed: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Returns the mean log-probability of each sequence's tokens `[exposed, length)`: those after the exposed prefix.

    Without gradients, statistics and shards, backend "triton" skips all other tokens: they cost neither a product nor a
    copy. Otherwise they are masked rows of `linear_logprobs`.

    Args:
        hidden: `[B, T, H]`; the state that predicts `targets[b, i]`.
        weight: `[V, H]`, or a `DTensor` sharded by its rows.
        targets: `[B, T]` int; positions outside the span may have any value.
        lengths: `[B]` int, number of tokens of each sequence, 0 to T.
        exposed: `[B]` int, length of the exposed prefix, at least 0. A span with `exposed >= lengths` is empty.
        temperature, bias, softcap, backend, chunk_bytes, logits_dtype: as for `linear_logprobs`.
        return_stats: also return `linear_logprobs`' `TokenStats`, `[B, T]`, zero outside the span.

    Returns:
        `[B]` fp32 (fp64 for fp64 inputs), in nats per token; 0 for an empty span. With `return_stats`, also the stats.

    Raises:
        ValueError: if shapes disagree, or a length or an exposure is out of range (not checked on a GPU).
        TypeError: for wrong dtypes.

    Example:
        >>> import torch
        >>> from atesd_kernels import exposure_logprobs
        >>> hidden, head = torch.zeros(2, 4, 8), torch.zeros(100, 8)
        >>> targets = torch.zeros(2, 4, dtype=torch.long)
        >>> exposure_logprobs(hidden, head, targets, torch.tensor([4, 3]), torch.tensor([1, 3])).exp()
        tensor([0.0100, 1.0000])
    """
    checks.check_tensor("hidden", hidden)
    checks.require(hidden.dim() == 3, lambda: f"hidden must be [B, T, H], got {tuple(hidden.shape)}.")
    checks.check_token_tensors(hidden.shape[:1], hidden.device, lengths=lengths, exposed=exposed)
    targets, lengths, exposed = targets.long(), lengths.long(), exposed.long()
    checks.check_spans(lengths, exposed, hidden.shape[1])
    mask = exposure_mask(lengths, exposed, hidden.shape[1])
    sharded = shard_of("weight", weight, None)[1] is not None
    if not return_stats and not sharded and not any(gradients_wanted(hidden, weight, bias).values()):
        checked = checked_logprobs(
            hidden, weight, targets, mask=mask, temperature=temperature, bias=bias, softcap=softcap, backend=backend,
            chunk_bytes=chunk_bytes, logits_dtype=logits_dtype,
        )  # fmt: skip
        if checked["backend"] == "triton":
            # on a GPU, no product includes tokens outside the span
            spec = LogprobSpec(**checked, stats=False).encode()
            return ops.exposure_means_op(hidden, weight, bias, targets, lengths, exposed, mask, spec)
    options: dict[str, Any] = dict(
        temperature=temperature, bias=bias, softcap=softcap, mask=mask, backend=backend, chunk_bytes=chunk_bytes,
        logits_dtype=logits_dtype, return_stats=return_stats,
    )  # fmt: skip
    result: Any = linear_logprobs(hidden, weight, targets, **options)
    logprobs, *stats = result if return_stats else (result,)
    means = logprobs.sum(1) / mask.sum(1).clamp_min(1)
    return (means, *stats) if return_stats else means
