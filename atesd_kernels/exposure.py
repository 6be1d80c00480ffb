"""Exposure spans: log-probabilities over a reference whose prefix the teacher was shown.

A teacher that reads the first part of a reference solution repeats it at will. Scoring it on the part it has not seen
asks the question that matters: does the exposed prefix help with the rest?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .arguments import checked_logprobs, gradients_wanted
from .losses import linear_logprobs
from .planning import TORCH
from .shards import backend_for, shard_of
from .stats import TokenStats


def exposure_mask(lengths: Tensor, exposed: Tensor, max_length: int) -> Tensor:
    """`[B, max_length]` bool, true at tokens `exposed[b] <= i < lengths[b]`; computed on the tensors' device."""
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
    """Mean log-probability of each sequence's tokens `[exposed, length)`: those after the exposed prefix.

    Without gradients and statistics the Triton backends skip all other tokens inside the kernel: no product, no copy.
    With them they are masked rows of `linear_logprobs`.

    Args:
        hidden: `[B, T, H]`; the state that predicts `targets[b, i]`.
        weight: `[V, H]`, or a `DTensor` sharded by its rows.
        targets: `[B, T]` int; positions outside the span may hold anything.
        lengths: `[B]` int, tokens of each sequence, from 0 to T.
        exposed: `[B]` int, how many of them the teacher was shown, at least 0; from `lengths` on, nothing is left.
        temperature, bias, softcap, backend, chunk_bytes, logits_dtype: as for `linear_logprobs`.
        return_stats: also return `linear_logprobs`' `TokenStats`, `[B, T]`, zero outside the span.

    Returns:
        `[B]` fp32 (fp64 for fp64 inputs), in nats per token; 0 for a sequence with no token in its span.

    Raises:
        ValueError: if shapes disagree, or a length or an exposure is out of range (looked at on a CPU; on a GPU that is
            the caller's promise, because looking would stop its stream); TypeError for wrong dtypes.

    Example:
        >>> import torch
        >>> from atesd_kernels import exposure_logprobs
        >>> hidden, head = torch.zeros(2, 4, 8), torch.zeros(100, 8)
        >>> targets = torch.zeros(2, 4, dtype=torch.long)
        >>> exposure_logprobs(hidden, head, targets, torch.tensor([4, 3]), torch.tensor([1, 3])).exp()
        tensor([0.0100, 1.0000])
    """
    checks.require(hidden.dim() == 3, lambda: f"hidden must be [B, T, H], got {tuple(hidden.shape)}.")
    checks.check_token_tensors(hidden.shape[:1], hidden.device, lengths=lengths, exposed=exposed)
    checks.check_spans(lengths, exposed, hidden.shape[1])
    mask = exposure_mask(lengths, exposed, hidden.shape[1])
    backend = backend_for(shard_of("weight", weight, None)[1], backend)
    if not return_stats and not any(gradients_wanted(hidden, weight, bias)):
        road, dtype = checked_logprobs(
            hidden, weight, targets, mask=mask, temperature=temperature, bias=bias, softcap=softcap, backend=backend,
            chunk_bytes=chunk_bytes, logits_dtype=logits_dtype,
        )  # fmt: skip
        if road not in TORCH:
            # on a GPU, tokens outside the span take no part in any product
            return ops.exposure_means_op(
                hidden, weight, bias, targets, lengths, exposed, mask, float(temperature), softcap, logits_dtype, dtype
            )
    options: dict[str, Any] = dict(
        temperature=temperature, bias=bias, softcap=softcap, mask=mask, backend=backend, chunk_bytes=chunk_bytes,
        logits_dtype=logits_dtype, return_stats=return_stats,
    )  # fmt: skip
    result: Any = linear_logprobs(hidden, weight, targets, **options)
    logprobs, *stats = result if return_stats else (result,)
    means = logprobs.sum(1) / mask.sum(1).clamp_min(1)
    return (means, *stats) if return_stats else means
