"""What every backend is asked, and what it answers: the seam between the public losses and the backends.

A backend sees flat rows (`[N, H]`), validated input, and these two records. It never sees reductions or autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import DivergenceTerm, term_of_key


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The options that both ops have."""

    temperature: float
    softcap: float | None
    logits_dtype: torch.dtype
    compute_dtype: torch.dtype  # of the GEMM operands: the inputs', or autocast's
    chunk_bytes: int | None
    stats: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    compiled: bool = False  # backend "torch": the elementwise passes through Inductor
    group: str | None = None  # backend "torch": the process group over which the head's rows are sharded

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad


@dataclass(frozen=True, kw_only=True)
class DivergenceSpec(LossSpec):
    """The options of one divergence call."""

    divergence: str  # the term's key
    beta: float
    teacher_temperature: float
    entry_clip: float | None
    token_clip: float | None

    @property
    def term(self) -> DivergenceTerm:
        return term_of_key(self.divergence)

    @property
    def clipped(self) -> bool:
        return self.entry_clip is not None


class LogprobSpec(LossSpec):
    """The options of one `linear_logprobs` call."""


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
