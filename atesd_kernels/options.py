"""Keyword options of the public losses, for type checkers. `losses.py` documents them.

The overloads of a loss need each option's type a second time, because `return_stats` changes the return type. Nothing
imports this file at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .divergences import DivergenceTerm


class DivergenceOptions(TypedDict, total=False):
    divergence: str | DivergenceTerm
    beta: float
    temperature: float
    teacher_temperature: float | None
    softcap: float | None
    mask: Tensor | None
    token_weight: Tensor | None
    targets: Tensor | None
    entry_clip: float | None
    token_clip: float | None
    reduction: str
    num_tokens: int | float | Tensor | None
    backend: str
    chunk_bytes: int | None


class LinearDivergenceOptions(DivergenceOptions, total=False):
    student_bias: Tensor | None
    teacher_bias: Tensor | Sequence[Tensor | None] | None
    teacher_mix: Tensor | None
    logits_dtype: torch.dtype
    group: ProcessGroup | None


class LogprobOptions(TypedDict, total=False):
    temperature: float
    bias: Tensor | None
    softcap: float | None
    mask: Tensor | None
    backend: str
    chunk_bytes: int | None
    logits_dtype: torch.dtype
    group: ProcessGroup | None


class TopkDivergenceOptions(TypedDict, total=False):
    divergence: str | DivergenceTerm
    beta: float
    tail: str
    temperature: float
    softcap: float | None
    mask: Tensor | None
    token_weight: Tensor | None
    targets: Tensor | None
    entry_clip: float | None
    token_clip: float | None
    reduction: str
    num_tokens: int | float | Tensor | None
    backend: str
    chunk_bytes: int | None


class LinearTopkDivergenceOptions(TopkDivergenceOptions, total=False):
    student_bias: Tensor | None
    logits_dtype: torch.dtype
    group: ProcessGroup | None
