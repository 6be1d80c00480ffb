"""What every backend is asked, and what it answers: the seam between the public losses and the backends.

A backend sees flat rows (`[N, H]`), validated input, and these two records. It never sees reductions or autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import DivergenceTerm, get_divergence


@dataclass(frozen=True)
class DivergenceSpec:
    """The options of one divergence call."""

    divergence: str
    beta: float
    temperature: float
    teacher_temperature: float
    softcap: float | None
    entry_clip: float | None
    token_clip: float | None
    logits_dtype: torch.dtype
    compute_dtype: torch.dtype  # of the GEMM operands: the inputs', or autocast's
    chunk_bytes: int | None
    stats: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def term(self) -> DivergenceTerm:
        return get_divergence(self.divergence, self.beta)

    @property
    def clipped(self) -> bool:
        return self.entry_clip is not None

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad


@dataclass(frozen=True)
class LogprobSpec:
    """The options of one `linear_logprobs` call."""

    temperature: float
    softcap: float | None
    logits_dtype: torch.dtype
    compute_dtype: torch.dtype
    chunk_bytes: int | None
    stats: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad


class RowResult(NamedTuple):
    """A backend's answer for `N` rows. Gradients are those of `sum_i row_weight[i] * value[i]` (weight 1 if None)."""

    value: Tensor  # [N] divergence after clips, or log-probability; 0 in masked rows
    stats: Tensor | None  # [len(TokenStats), N], in TokenStats' order
    hidden_grad: Tensor | None  # [N, H], in gradient_dtype of the input's, as the others
    weight_grad: Tensor | None  # [V, H]
    bias_grad: Tensor | None  # [V]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a gradient waits for its upstream factor: a loss scaler's would come too late for an fp16 underflow."""
    return torch.float32 if dtype == torch.float16 else dtype
