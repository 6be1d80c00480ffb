"""Inputs and outputs of a backend: `LossSpec`, a record of options, and `RowResult`, a record of tensors.

A backend gets flat rows (`[N, H]`), validated inputs and a `LossSpec`. Reductions and autograd are in `ops.py`. Its
operators take plain values only, so they pass a spec as one string.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .divergences import DivergenceTerm, term_of_key
from .planning import COMPILED, CPP

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """Options common to all losses.

    `encode` and `decode` convert to a string and back without loss: Python's `repr` of a float is exact.
    """

    backend: str
    temperature: float
    softcap: float | None
    logits_dtype: torch.dtype
    compute_dtype: torch.dtype  # of the GEMM operands: the inputs', or autocast's
    chunk_bytes: int | None
    stats: bool
    hidden_grad: bool = False  # gradients that the caller needs; in a backend, those it must compute
    weight_grad: bool = False
    bias_grad: bool = False
    weighted: bool = False  # the operator returns the sum over rows times row_weight, not each row's value
    group: str | None = None  # the process group over which the head's rows are sharded

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad

    @property
    def compiled(self) -> bool:
        """Whether Inductor compiles the elementwise passes of backend "torch"."""
        return self.backend == COMPILED

    @property
    def in_cpp(self) -> bool:
        """Whether C++ computes what stands beside the products of backend "torch"."""
        return self.backend == CPP

    @property
    def runs_again(self) -> bool:
        """Whether backward runs the operator again: a trained head sums over rows with different upstream gradients."""
        return not self.weighted and (self.weight_grad or self.bias_grad)

    def encode(self) -> str:
        return "{" + ", ".join([f"{f.name!r}: {_literal(getattr(self, f.name))}" for f in fields(self)]) + "}"

    def shared_by_ranks(self) -> str:
        """Returns the options that must agree on all ranks of `group`, for people and for comparison.

        Chunks may differ: ranks take the smallest. So may a divergence's key, which numbers objects of one name.
        """
        own = ("group", "chunk_bytes", "weight_grad", "bias_grad")
        options = {f.name: str(getattr(self, f.name)).partition("#")[0] for f in fields(self) if f.name not in own}
        return ", ".join(f"{name}={value}" for name, value in options.items())

    @classmethod
    @lru_cache(maxsize=1024)
    def decode(cls, text: str) -> Self:
        options: dict[str, Any] = ast.literal_eval(text)
        for name in ("logits_dtype", "compute_dtype"):
            options[name] = getattr(torch, options[name].removeprefix("torch."))
        return cls(**options)

    @classmethod
    @lru_cache(maxsize=1024)
    def decode_for_forward(cls, text: str) -> Self:
        """As `decode`, without the gradients that backward computes."""
        spec = cls.decode(text)
        return replace(spec, hidden_grad=False, weight_grad=False, bias_grad=False) if spec.runs_again else spec


def _literal(value: Any) -> str:
    """Returns a Python literal. torch.compile can format constants only, so this specialises symbolic numbers."""
    if isinstance(value, torch.dtype):
        return f"'{value}'"
    if isinstance(value, (int, float)) and torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        value = guard_scalar(value)
    return f"{value!r}"


@dataclass(frozen=True, kw_only=True)
class DivergenceSpec(LossSpec):
    """Options of one divergence call."""

    divergence: str  # the term's key
    beta: float
    teacher_temperature: float
    entry_clip: float | None
    token_clip: float | None

    @property
    def term(self) -> DivergenceTerm:
        return term_of_key(self.divergence)


@dataclass(frozen=True, kw_only=True)
class TopkSpec(DivergenceSpec):
    """Options of one `linear_topk_divergence` call. `teacher_temperature` has no effect: the teacher is given."""

    tail: str  # one of checks.TAILS


class LogprobSpec(LossSpec):
    """Options of one `linear_logprobs` call."""


class RowResult(NamedTuple):
    """Result of a backend for `N` rows. Gradients are of `sum_i row_weight[i] * value[i]` (None: weight 1)."""

    value: Tensor  # [N] divergence after clips, or log-probability; 0 in masked rows
    stats: Tensor | None  # [len(TokenStats), N], in TokenStats' order
    hidden_grad: Tensor | None  # [N, H]; each gradient has the gradient_dtype of its input
    weight_grad: Tensor | None  # [V, H]
    bias_grad: Tensor | None  # [V]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of accumulators: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which gradients are stored between forward and backward. fp32 for fp16 inputs: a loss scaler multiplies
    too late to undo an underflow."""
    return torch.float32 if dtype == torch.float16 else dtype
