"""Backend "torch" for several views of a teacher: the sources of a mixture's logits. The sweeps are `torch_chunked`'s.

With one head for all and no softcap, a mixture of logits is that of hidden states: one product gives the difference,
as for one teacher. Otherwise each view takes a product, and its blocks of logits are mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import DivergenceSpec, RowResult
from . import matmul
from .logit_source import LinearLogits
from .mixing import Biases, add_mixed, mixed_difference
from .scaling import capped
from .torch_chunked import run


def divergence_views(
    spec: DivergenceSpec,
    student_hidden: Tensor,  # [N, H]
    student_weight: Tensor,  # [V, H]
    teacher_hidden: list[Tensor],  # M of [N, H_m]
    teacher_weight: list[Tensor | None],  # M of [V, H_m]; None: the student's
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [M, V]; None: each view has the student's
    teacher_mix: Tensor,  # [M, N]
    mask: Tensor | None,  # [N] bool
    row_weight: Tensor | None,  # [N]
    targets: Tensor | None,  # [N]
) -> RowResult:
    by_states = spec.softcap is None and all(weight is None for weight in teacher_weight)
    source = (MixedStates if by_states else MixedLogits)(
        spec, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, teacher_mix
    )
    return run(spec, source, mask, row_weight, targets)


class MixedLogits(LinearLogits):
    """Mixes the views' logits, block by block. If all share the head, their differences from the student's are mixed.

    A softcap applies to each view before the mixture.
    """

    compares_heads = False

    def __init__(self, spec: DivergenceSpec, h_s, w_s, h_t, w_t, bias_s, bias_t, mix: Tensor):
        own = next((weight for weight in w_t if weight is not None), None)  # tells the base class of separate heads
        super().__init__(spec, h_s, w_s, None, own, bias_s, bias_t)
        self.states, self.heads, self.weights = h_t, w_t, mix
        self.biases = Biases(bias_s, bias_t, len(h_t), self.dtype)
        # of a block: the mixture, and the temporaries of one view's softcap
        self.mixing_bytes = (1 if spec.softcap is None else 8) * max(self.s_dtype.itemsize, self.dtype.itemsize)

    def load_teacher(self, index: Tensor) -> None:
        self.mix = self.weights[:, index]  # [M, R]
        self.view_rows = [states[index] for states in self.states]
        if self.is_delta:
            student = self.hidden[index].to(self.dtype)
            self.view_differences = [self.rounded(h.to(self.dtype) - student) for h in self.view_rows]

    def teacher(self, cols: slice) -> Tensor:
        total = self._zeros("mixed logits", cols, self.s_dtype)
        for m, w in enumerate(self.mix.to(total.dtype)):
            z = self._raw(m, cols)
            total.addcmul_(z if self.spec.softcap is None else capped(z, self.spec.softcap), w[:, None])
        if self.spec.teacher_temperature != 1:
            total.div_(self.spec.teacher_temperature)
        return total if self.biases.excluded is None else total.add_(self.biases.excluded[cols])

    def difference(self, cols: slice, kept: Tensor) -> Tensor:
        if self.spec.softcap is None:
            return self.teacher(cols).sub_(kept)
        total = self._zeros("mixed difference", cols, kept.dtype)
        for m, w in enumerate(self.mix.to(total.dtype)):
            d = self._raw_difference(m, cols) if self.is_delta else self._raw(m, cols).sub_(kept)
            total.addcmul_(self.scaling.capped_difference(kept, d), w[:, None])
        return self.scaling.tempered(kept, total)

    def _raw(self, m: int, cols: slice) -> Tensor:
        """Returns a view's logits before the softcap, `[R, C]`, without -inf."""
        head = self.weight if self.heads[m] is None else self.heads[m]
        w = self.work.cast("head", head[cols], self.spec.compute_dtype)
        z = matmul.logits(self.view_rows[m].to(w.dtype), w, self.s_dtype, work=self.work, use="teacher")
        return self.scaling.raw(z, None if self.biases.teacher is None else self.biases.teacher[m, cols])

    def _raw_difference(self, m: int, cols: slice) -> Tensor:
        """Returns a view's logits minus the student's before the softcap, `[R, C]`."""
        d = self._difference_product(self.view_differences[m], cols, None)
        return d if self.biases.shift is None else d.add_(self.biases.shift[m, cols])

    def _zeros(self, use: str, cols: slice, dtype: torch.dtype) -> Tensor:
        shape = len(self.index), cols.stop - cols.start
        dtype = torch.promote_types(dtype, self.dtype)
        buffer = self.work.empty(use, shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device) if buffer is None else buffer.zero_()


class MixedStates(LinearLogits):
    """Mixes the views' hidden states: the product with the head is that of one teacher."""

    def __init__(self, spec: DivergenceSpec, h_s, w_s, h_t, w_t, bias_s, bias_t, mix: Tensor):
        super().__init__(spec, h_s, w_s, None, None, bias_s, bias_t)
        self.states, self.weights = h_t, mix
        self.biases = Biases(bias_s, bias_t, len(h_t), self.dtype)

    def load_teacher(self, index: Tensor) -> None:
        self.mix = self.weights[:, index]  # [M, R]
        self.view_rows = [states[index] for states in self.states]
        self.rows_t = self.rounded(mixed_difference(self.view_rows, self.hidden[index], self.mix, self.dtype))

    def _teacher_product(self, cols: slice) -> Tensor:
        # rare: only where the student's logit or the difference is not finite
        rows = sum(h.to(self.dtype) * w[:, None] for h, w in zip(self.view_rows, self.mix.to(self.dtype), strict=True))
        w = self.weight[cols].to(self.spec.compute_dtype).to(self.dtype)
        return matmul.logits(rows, w, self.s_dtype, work=self.work, use="teacher")

    def _teacher_bias(self, cols: slice) -> Tensor | None:
        if self.biases.teacher is None:
            return None
        bias = self.biases.excluded[cols].repeat(len(self.index), 1)
        return add_mixed(bias, self.biases.teacher[:, cols], self.mix)

    def _bias_shift(self, cols: slice) -> Tensor | None:
        if self.biases.shift is None:
            return None
        shift = self.mix.new_zeros(len(self.index), cols.stop - cols.start, dtype=self.dtype)
        return add_mixed(shift, self.biases.shift[:, cols], self.mix)
