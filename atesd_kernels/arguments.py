"""From what users pass to what the operators take: options checked and resolved, masks and weights one per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .divergences import get_divergence
from .planning import choose_backend
from .shards import is_dtensor
from .spec import accumulate_dtype


class Checked(NamedTuple):
    """What both divergences make of their options."""

    mask: Tensor | None  # [N] bool
    row_weight: Tensor | None  # [N], see row_weight_of
    targets: Tensor | None  # [N]
    options: tuple  # in the operators' order

    @property
    def backend(self) -> str:
        return self.options[0]


def checked_divergence(
    lead: torch.Size, device, dtype, *, divergence, beta, temperature, teacher_temperature, softcap, mask, token_weight,
    targets, entry_clip, token_clip, reduction, num_tokens, backend, chunk_bytes,
) -> Checked:  # fmt: skip
    """Check the options that `linear_divergence` and `divergence` share."""
    checks.check_scalars(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        softcap=softcap,
        entry_clip=entry_clip,
        token_clip=token_clip,
        chunk_bytes=chunk_bytes,
        reduction=reduction,
    )
    checks.check_token_tensors(lead, device, mask=mask, token_weight=token_weight, targets=targets)
    term = get_divergence(divergence, beta)
    options = (
        choose_backend(backend, device, dtype, term.triton is not None),
        term.key,
        float(beta),
        float(temperature),
        float(temperature if teacher_temperature is None else teacher_temperature),
        softcap,
        entry_clip,
        token_clip,
    )
    row_weight = row_weight_of(token_weight, mask, lead.numel(), device, dtype, reduction, num_tokens)
    return Checked(flat_mask(mask), row_weight, None if targets is None else targets.reshape(-1), options)


def checked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask, temperature, bias, softcap, backend, chunk_bytes,
    logits_dtype,
) -> tuple[str, torch.dtype]:  # fmt: skip
    """Check the arguments of `linear_logprobs`; the backend that runs them and the dtype of its products."""
    checks.check_head("student", hidden, weight, bias)
    checks.check_scalars(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    checks.check_token_tensors(hidden.shape[:-1], hidden.device, mask=mask, targets=targets)
    dtype = checked_compute_dtype(hidden, logits_dtype, weight=weight)
    return choose_backend(backend, hidden.device, dtype, True), dtype


def checked_compute_dtype(hidden: Tensor, logits_dtype: torch.dtype, **heads: Tensor | None) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, which casts all operands, else the inputs'."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype, heads = torch.get_autocast_dtype(device), {}
    else:
        dtype = hidden.dtype
    checks.check_dtypes(dtype, logits_dtype, **heads)
    return dtype


def gradients_wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).bool()


def teacher_bias_of(teacher_weight, teacher_bias, student_bias) -> Tensor | None:
    """None where the shared head's bias cancels in the logit difference."""
    if teacher_bias is None or (teacher_weight is None and teacher_bias is student_bias):
        return None
    return teacher_bias.detach()


def row_weight_of(token_weight, mask, num_rows: int, device, dtype, reduction: str, num_tokens) -> Tensor | None:
    """`[N]`, what each row's value counts for in the loss; None where that is 1."""
    checks.check_num_tokens(num_tokens)
    weight = None if token_weight is None else token_weight.detach().reshape(-1).to(accumulate_dtype(dtype))
    mask = flat_mask(mask)
    if weight is not None and mask is not None:
        weight = torch.where(mask, weight, 0.0)  # a masked token's weight may be anything, NaN included
    if reduction != "mean":
        return weight
    if num_tokens is None:
        num_tokens = max(num_rows, 1) if mask is None else mask.sum().clamp_min(1)
    weight = torch.ones(num_rows, dtype=accumulate_dtype(dtype), device=device) if weight is None else weight
    return weight / num_tokens


def same_storage(a: Any, b: Any) -> bool:
    """Whether `b` is `a`, or a view of all of it such as `a.detach()`."""
    if a is b or torch.compiler.is_compiling():
        return a is b
    if is_dtensor(a) and is_dtensor(b):  # whose own pointer is 0
        return a.placements == b.placements and same_storage(a.to_local(), b.to_local())
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
