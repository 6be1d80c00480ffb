"""Backends compute the losses. Each is a module with the functions of `Backend`; `ops.py` selects one by name.

| name             | divergence_rows, divergence_logits | logprob_rows     |
|------------------|------------------------------------|------------------|
| "torch"          | `torch_chunked`, views `torch_views` | `torch_logprobs` |
| "torch_compiled" | the same, elementwise passes through Inductor | the same |
| "cpp"            | the same, with chunks of `cpp_chunk`  | the same, with chunks of `cpp_logprobs` |
| "triton"         | `triton_chunked`, views `triton_views` | `triton_chunked` |
| "module:object"  | functions of the caller's object   | the same         |

`triton_exposure.exposure_means` computes mean log-probabilities without gradients. The torch backends have no such
function: there `exposure_logprobs` masks rows of `linear_logprobs`.

Against a teacher known by its top K entries, `torch_topk` and `triton_topk` have the functions of `TopkBackend`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..spec import DivergenceSpec, LogprobSpec, RowResult, TopkSpec


class TopkBackend(Protocol):
    """The functions of `linear_topk_divergence` and `topk_divergence`. A backend of the caller's may lack them."""

    def topk_rows(
        self,
        spec: TopkSpec,
        student_hidden: Tensor,  # [N, H]
        student_weight: Tensor,  # [V, H]
        student_bias: Tensor | None,  # [V]
        teacher_ids: Tensor,  # [N, K], -1: padding
        teacher_logprobs: Tensor,  # [N, K]
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
        targets: Tensor | None,  # [N]
    ) -> RowResult: ...

    def topk_logits(
        self,
        spec: TopkSpec,
        student_logits: Tensor,  # [N, V]
        teacher_ids: Tensor,  # [N, K], -1: padding
        teacher_logprobs: Tensor,  # [N, K]
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
        targets: Tensor | None,  # [N]
    ) -> RowResult: ...


class Backend(Protocol):
    """The functions of a backend. Rows are flat and inputs are validated. Reductions and autograd happen in `ops.py`.
    Masked rows have value 0 and affect no result, even if they contain NaN. `row_weight` scales gradients only."""

    def divergence_rows(
        self,
        spec: DivergenceSpec,
        student_hidden: Tensor,  # [N, H]
        student_weight: Tensor,  # [V, H]
        teacher_hidden: Tensor,  # [N, H_t]
        teacher_weight: Tensor | None,  # [V, H_t]; None: the student's
        student_bias: Tensor | None,  # [V]
        teacher_bias: Tensor | None,  # [V]
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
        targets: Tensor | None,  # [N]
    ) -> RowResult: ...

    def divergence_logits(
        self,
        spec: DivergenceSpec,
        student_logits: Tensor,  # [N, V]
        teacher_logits: Tensor,  # [N, V]
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
        targets: Tensor | None,  # [N]
    ) -> RowResult: ...

    def logprob_rows(
        self,
        spec: LogprobSpec,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
    ) -> RowResult: ...


class MixingBackend(Backend, Protocol):
    """A backend that also mixes M views of a teacher: the target's logits are the views', each with its softcap,
    weighted by `teacher_mix` and divided by the teacher's temperature."""

    def divergence_views(
        self,
        spec: DivergenceSpec,
        student_hidden: Tensor,  # [N, H]
        student_weight: Tensor,  # [V, H]
        teacher_hidden: list[Tensor],  # M of [N, H_m]
        teacher_weight: list[Tensor | None],  # M of [V, H_m]; None: the student's
        student_bias: Tensor | None,  # [V]
        teacher_bias: Tensor | None,  # [M, V], with -inf in all views or none; None: each view has the student's
        teacher_mix: Tensor,  # [M, N] float64; sums to 1 in rows that count
        mask: Tensor | None,  # [N] bool
        row_weight: Tensor | None,  # [N]
        targets: Tensor | None,  # [N]
    ) -> RowResult: ...
