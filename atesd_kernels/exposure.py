"""Exposure spans: log-probabilities over a reference whose prefix the teacher was shown.

A teacher that reads the first part of a reference solution repeats it at will. Scoring it on the part it has not seen
asks the question that matters: does the exposed prefix help with the rest?
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops
from .losses import _compute_dtype, _wanted, linear_logprobs
from .planning import choose_backend


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
    **options,
) -> Tensor:
    """Mean log-probability of each sequence's tokens `[exposed, length)`: those after the exposed prefix.

    Args:
        hidden: `[B, T, H]`; the state that predicts `targets[b, i]`.
        weight: `[V, H]`.
        targets: `[B, T]` int; positions outside the span may hold anything.
        lengths: `[B]` int, tokens of each sequence, at most T.
        exposed: `[B]` int, how many of them the teacher was shown.
        **options: as for `linear_logprobs`, without `mask` and `return_stats`.

    Returns:
        `[B]` fp32 (fp64 for fp64 inputs), in nats per token; 0 for a sequence with no token in its span.

    Raises:
        ValueError: if shapes disagree; TypeError for wrong dtypes.

    Example:
        >>> import torch
        >>> from atesd_kernels import exposure_logprobs
        >>> hidden, head = torch.zeros(2, 4, 8), torch.zeros(100, 8)
        >>> targets = torch.zeros(2, 4, dtype=torch.long)
        >>> exposure_logprobs(hidden, head, targets, torch.tensor([4, 3]), torch.tensor([1, 3])).exp()
        tensor([0.0100, 1.0000])
    """
    checks.require(hidden.dim() == 3, f"hidden must be [B, T, H], got {tuple(hidden.shape)}.")
    checks.check_token_tensors(hidden.shape[:1], hidden.device, lengths=lengths, exposed=exposed)
    mask = exposure_mask(lengths, exposed, hidden.shape[1])
    if not any(_wanted(hidden, weight, options.get("bias"))):
        means = _skipping_means(hidden, weight, targets, lengths, exposed, mask, **options)
        if means is not None:
            return means
    logprobs = linear_logprobs(hidden, weight, targets, mask=mask, **options)
    return logprobs.sum(1) / mask.sum(1).clamp_min(1)


def _skipping_means(
    hidden, weight, targets, lengths, exposed, mask, *, temperature=1.0, bias=None, softcap=None, backend="auto",
    chunk_bytes=None, logits_dtype=torch.float32,
) -> Tensor | None:  # fmt: skip
    """The same on a GPU, where tokens outside the span take no part in any product; None on another backend."""
    checks.check_head("student", hidden, weight, bias)
    checks.check_scalars(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    checks.check_token_tensors(hidden.shape[:-1], hidden.device, targets=targets)
    dtype = _compute_dtype(hidden)
    checks.check_dtypes(dtype, logits_dtype, **({} if dtype != hidden.dtype else {"weight": weight}))
    if choose_backend(backend, hidden.device, dtype, True) == "torch":
        return None
    return ops.exposure_means_op(
        hidden, weight, bias, targets, lengths, exposed, mask, float(temperature), softcap, logits_dtype, dtype
    )
