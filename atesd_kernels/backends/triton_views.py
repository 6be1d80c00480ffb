"""Backend "triton" for several views of a teacher: makes a mixture's D. The sweeps are `triton_chunked`'s.

With one head for all and no softcap, D is one product, of the mixture of the hidden states' differences. Otherwise each
view takes a product, in a buffer of its own, and a kernel adds its difference from the student's logits to D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import mixing as mixing_kernels
from ..kernels.rows import CAPPED_DELTA
from ..shards import Shards
from ..spec import DivergenceSpec, RowResult
from . import matmul, tuning
from .mixing import Biases, add_mixed, mixed_difference
from .triton_chunked import delta_parts, difference_logits, logit_dtypes, sweep_chunks


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
    w_s = student_weight.to(spec.compute_dtype)
    by_states = spec.softcap is None and all(weight is None for weight in teacher_weight)
    teacher = (MixedStates if by_states else MixedLogits)(
        spec, student_hidden, w_s, teacher_hidden, teacher_weight, student_bias, teacher_bias, teacher_mix
    )
    return sweep_chunks(spec, teacher, student_hidden, student_weight, w_s, student_bias, mask, row_weight, targets)


class Mixture:
    """What `sweep_chunks` asks of a teacher, as `triton_chunked.Teacher` describes it.

    D contains the differences of the biases. The kernels add the student's to both models, and the exclusions.
    """

    def __init__(self, spec: DivergenceSpec, h_s, w_s, h_t, w_t, bias_s, bias_t, mix: Tensor):
        self.spec, self.h_s, self.w_s, self.h_t, self.w_t = spec, h_s, w_s, h_t, w_t
        self.shards = Shards(spec.group, w_s.shape[0], h_s.device)
        self.mix = mix.float().contiguous()  # [M, N]
        bias = self.bias = Biases(bias_s, bias_t, len(h_t), torch.float32)
        self.biases = (None, None)
        if bias.student is not None:
            self.biases = (bias.student if bias_s is None else bias_s, bias.student + bias.excluded)


class MixedStates(Mixture):
    """Mixes the views' hidden states: D takes one product."""

    mixing_bytes = 0

    def __init__(self, spec: DivergenceSpec, *tensors):
        super().__init__(spec, *tensors)
        self.s_dtype, self.o_dtype = logit_dtypes(spec, True)
        self.is_delta = delta_parts(spec, True)
        if self.bias.shift is not None:
            self.o_dtype = torch.float32

    def logits(self, rows: slice, s: Tensor) -> Tensor:
        mix = self.mix[:, rows]
        wide = mixed_difference([h[rows] for h in self.h_t], self.h_s[rows], mix, torch.float32)
        o = difference_logits(self.spec, wide, s, self.w_s, self.o_dtype, self.shards)
        return o if self.bias.shift is None else add_mixed(o, self.bias.shift, mix)


class MixedLogits(Mixture):
    """Mixes the views' logits, each with its softcap: D takes a product for each view."""

    def __init__(self, spec: DivergenceSpec, *tensors):
        super().__init__(spec, *tensors)
        self.shared = all(weight is None for weight in self.w_t)
        self.s_dtype = logit_dtypes(spec, self.shared)[0]
        self.o_dtype = torch.float32
        self.product_dtype = torch.float32 if self.shared else self.s_dtype
        self.mixing_bytes = self.product_dtype.itemsize
        self.is_delta = 1 if spec.softcap is None else CAPPED_DELTA.value
        self.heads = [self.w_s if weight is None else weight.to(spec.compute_dtype) for weight in self.w_t]

    def logits(self, rows: slice, s: Tensor) -> Tensor:
        o = torch.empty(s.shape, dtype=self.o_dtype, device=s.device)
        for m, head in enumerate(self.heads):
            h = self.h_t[m][rows]
            if self.shared:
                wide = h.float() - self.h_s[rows].float()
                product = difference_logits(self.spec, wide, s, head, self.product_dtype, self.shards)
            else:
                product = matmul.logits(h.to(self.spec.compute_dtype), head, self.product_dtype)
            self.add(o, s, product, rows, m)
            del product  # free it before allocating the next
        return o

    def add(self, o: Tensor, s: Tensor, product: Tensor, rows: slice, m: int) -> None:
        """Adds the weighted difference of view `m` from the student to `o`; the first view overwrites it."""
        if not o.numel():
            return
        config = tuning.row_config(o.device, o.shape[1])
        shift = None if self.bias.shift is None else self.bias.shift[m]
        mixing_kernels.add_view[(len(o), -(-o.shape[1] // config.block))](
            o, s, product, self.mix[m, rows], self.bias.student, shift, o.stride(0), s.stride(0), product.stride(0),
            o.shape[1], self.spec.softcap, IS_DELTA=self.shared, FIRST=m == 0, **config.constants,
        )  # fmt: skip
