"""Sources of the torch backend's logits, and sinks of their gradient: a linear head, or logits from the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning import ChunkPlan
from ..shards import Shards
from ..spec import DivergenceSpec, LogprobSpec, accumulate_dtype, gradient_dtype
from . import matmul
from .scaling import Scaling
from .workspace import Workspace

# Our choice: a teacher's head is near the student's if no row differs by more than this share of the median row's norm.
NEAR_HEAD = 2.0**-8


class LinearGradients:
    """Accumulates the gradients of a linear head's inputs, chunk by chunk and block by block."""

    mixing_bytes = 0  # of temporaries for an entry of a block, beside those of one teacher

    def __init__(self, spec: DivergenceSpec | LogprobSpec, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.spec, self.hidden, self.weight, self.bias = spec, hidden, weight, bias
        self.num_rows, self.vocab, self.device = hidden.shape[0], weight.shape[0], hidden.device
        self.shards = Shards(spec.group, self.vocab, self.device)
        self.dtype = accumulate_dtype(spec.compute_dtype)
        self.scaling = Scaling(spec)
        self.s_dtype = torch.float64 if spec.compute_dtype == torch.float64 else spec.logits_dtype
        # dtype of the GEMMs that multiply the logits' gradient by head and hidden states
        self.product_dtype = matmul.product_dtype(spec.compute_dtype, self.device)
        self.work = Workspace(self.device, spec.in_cpp)
        self.grad_scale: Tensor | None = None  # factor in take_gradient's input; `unscaled` divides by it
        self.hidden_grad = torch.zeros_like(hidden, dtype=gradient_dtype(hidden.dtype)) if spec.hidden_grad else None
        self.weight_grad = torch.empty(weight.shape, dtype=self.dtype, device=self.device) if spec.weight_grad else None
        self.begun = False  # whether a chunk is in weight_grad: the first one overwrites it
        self.bias_grad = torch.zeros(self.vocab, dtype=self.dtype, device=self.device) if spec.bias_grad else None

    def scale_gradients(self, row_weight: Tensor | None) -> None:
        """Sets `grad_scale` for fp16, which underflows at 6e-8: smaller entries of q - p carry the direction."""
        if self.product_dtype == torch.float16 and self.spec.any_grad:
            largest = torch.ones((), device=self.device) if row_weight is None else row_weight.abs().amax()
            self.grad_scale = 1024 / largest.float().clamp_min(torch.finfo(torch.float32).tiny)

    def unscaled(self, grad: Tensor) -> Tensor:
        return grad if self.grad_scale is None else grad.div_(self.grad_scale)

    def product_blocks(self, plan: ChunkPlan) -> list[slice]:
        """Returns the columns of a chunk's products for backend "cpp": all at once if no block is a temporary."""
        dtype = self.weight.dtype
        bare = dtype == self.spec.compute_dtype and self.s_dtype == torch.float32
        in_place = matmul.writes_in_place(dtype, self.hidden.shape[1])
        return [slice(0, self.vocab)] if bare and in_place else plan.blocks(self.vocab)

    def load(self, index: Tensor) -> None:
        """Selects the chunk's rows and casts them to the compute dtype."""
        self.index = index
        self.rows = self.hidden[index].to(self.spec.compute_dtype)
        self.rows_grad = (
            torch.zeros(self.rows.shape, dtype=self.dtype, device=self.device) if self.spec.hidden_grad else None
        )

    @property
    def scales_late(self) -> bool:
        """Whether row factors may be applied to the `[R, H]` product: no head mixes rows, and nothing underflows."""
        return not (self.spec.weight_grad or self.spec.bias_grad) and self.product_dtype != torch.float16

    def gradient_storage(self, block: Tensor) -> Tensor:
        """Returns a tensor for a block's gradient, in the products' dtype: `block` itself if its dtype matches."""
        same = block.dtype == self.product_dtype
        return block if same else torch.empty_like(block, dtype=self.product_dtype)

    def row_gradient(self, d: Tensor) -> Tensor:
        """Returns a tensor for the gradient of whole rows, `[R, V]`, in the products' dtype: `d` itself, or the first
        half of each of its rows."""
        return d.view(self.product_dtype)[:, : d.shape[1]]

    def take_gradient(self, cols: slice, g: Tensor, factor: Tensor | None = None) -> None:
        """Adds a block's gradient `g` `[R, C]` to those of hidden states (times row `factor` `[R]`), head and bias."""
        if self.rows_grad is not None:
            w = self.work.cast("head", self.weight[cols], g.dtype)
            if factor is None:
                matmul.add_hidden_grad(self.rows_grad, g, w, self.work)
            else:
                self.rows_grad += matmul.hidden_grad(g, w) * factor[:, None]
        if self.weight_grad is not None:
            matmul.add_weight_grad(self.weight_grad[cols], g, self.rows, overwrite=not self.begun)
        if self.bias_grad is not None:
            self.bias_grad[cols] += g.sum(0, dtype=self.dtype)

    def finish_rows(self, factor: Tensor | None = None) -> None:
        """Ends a chunk, all blocks of which were taken. Multiplies its gradient of the hidden states by row `factor`
        `[R]`, if given."""
        self.begun = True
        if self.rows_grad is not None:
            (grad,) = self.shards.sum(self.rows_grad)
            if factor is not None:
                grad.mul_(factor[:, None])
            self.hidden_grad[self.index] = self.unscaled(grad).to(self.hidden_grad.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        def finished(grad, like):
            return None if grad is None else self.unscaled(grad).to(gradient_dtype(like.dtype))

        if self.weight_grad is not None and not self.begun:
            self.weight_grad.zero_()
        return self.hidden_grad, finished(self.weight_grad, self.weight), finished(self.bias_grad, self.bias)


class LinearLogits(LinearGradients):
    """Computes teacher and student logits of a chunk, block by block, from hidden states and heads.

    A shared head gives the logit differences directly, as `D = (H_t - H_s) W^T`. The difference of two nearly equal
    hidden states is rounded once, before the product; two rounded logits are not subtracted. Separate heads give both
    models' logits. For fp32 inputs these are fp64, because the loss depends on their difference, unless the heads are
    near (a student that trains its own beside the one that it began with): then D = (H_t - H_s) W^T + H_t (W_t - W)^T.
    """

    compares_heads = True

    def __init__(self, spec: DivergenceSpec, h_s, w_s, h_t, w_t, bias_s, bias_t):
        super().__init__(spec, h_s, w_s, bias_s)
        self.h_t, self.w_t, self.bias_t = h_t, w_t, bias_t
        self.is_delta = w_t is None
        self.may_be_infinite = bias_s is not None or bias_t is not None
        self.other_dtype = self._delta_dtype() if self.is_delta else self.s_dtype
        wide = not self.is_delta and spec.compute_dtype == spec.logits_dtype == torch.float32
        if wide:
            self.s_dtype = self.other_dtype = torch.float64
        self.heads_near = wide and self._can_compare_heads()  # until a block is found in which they are not

    def _can_compare_heads(self) -> bool:
        if not self.compares_heads or self.spec.group is not None or self.may_be_infinite:
            return False
        same_size = self.weight.shape == self.w_t.shape
        return same_size and self.weight.dtype == self.w_t.dtype == self.h_t.dtype == torch.float32

    def _delta_dtype(self) -> torch.dtype:
        """Dtype of D: the products' if D is a bare matmul and its term smooth; else fp32, where rounding costs more."""
        spec = self.spec
        plain = self.bias_t is None and not self.scaling.needs_logits and spec.term.smooth
        return self.product_dtype if plain else self.dtype

    @property
    def rounds_difference(self) -> bool:
        """Whether D is rounded to less than the precision of the sweeps."""
        return self.is_delta and self.other_dtype != self.dtype

    def keep_difference(self) -> None:
        """Stops rounding D."""
        self.other_dtype = self.dtype

    def product_blocks(self, plan: ChunkPlan) -> list[slice]:
        narrow = self.spec.compute_dtype == torch.float32 or self.spec.term.smooth  # else the head is widened for D
        return super().product_blocks(plan) if self.is_delta and narrow else plan.blocks(self.vocab)

    @property
    def is_plain(self) -> bool:
        """Whether one factor each scales the products to the student's logits and to the difference."""
        return self.is_delta and not self.scaling.needs_logits

    @property
    def joins(self) -> bool:
        """Whether student logits and an unrounded difference come from products of one kind with the same head."""
        alike = self.is_plain and self.rows.dtype == self.rows_t.dtype and self.s_dtype == self.dtype
        return alike or self.heads_near

    def load(self, index: Tensor) -> None:
        super().load(index)
        self.offset: Tensor | None = None
        self.load_teacher(index)

    def load_teacher(self, index: Tensor) -> None:
        """Forms the operand of the difference, if the head is shared."""
        if self.is_delta or self.heads_near:
            self.rows_t = self.rounded(self.h_t[index].to(self.dtype) - self.hidden[index].to(self.dtype))

    def rounded(self, difference: Tensor) -> Tensor:
        """Returns a difference of hidden states, rounded once, to the dtype of its product with the head."""
        return difference.to(self.product_dtype if self.spec.term.smooth else self.dtype)

    def student(self, cols: slice) -> Tensor:
        """Returns the kept student logits (see `Scaling`) of the vocabulary entries `cols`, `[R, C]`."""
        w = self.work.cast("head", self.weight[cols], self.spec.compute_dtype)
        s = matmul.logits(self.rows, w, self.s_dtype, work=self.work, use="student")
        return self.scaling.keep(s, _cols(self.bias, cols))

    def teacher(self, cols: slice) -> Tensor:
        """Returns the scaled teacher logits, `[R, C]`."""
        return self.scaling.teacher(self._teacher_product(cols), self._teacher_bias(cols))

    def _teacher_product(self, cols: slice) -> Tensor:
        weight = self.weight if self.is_delta else self.w_t
        rows = self.h_t[self.index].to(self.spec.compute_dtype)
        w = self.work.cast("head", weight[cols], self.spec.compute_dtype)
        return matmul.logits(rows, w, self.s_dtype, work=self.work, use="teacher")

    def _teacher_bias(self, cols: slice) -> Tensor | None:
        return _cols(self.bias if self.is_delta and self.bias_t is None else self.bias_t, cols)

    def centre(self, top: Tensor, height: Tensor) -> None:
        """Makes `difference` subtract from each row D's value at the token `top` `[R]`, whose logit is `height` `[R]`.

        A constant changes no softmax. D's rounding error is relative to D, so D should be small where q is large. With
        shards, the rank with the largest `height` gives the value.
        """
        w = self.weight[top].to(self.rows_t.dtype)
        offset = torch.linalg.vecdot(self.rows_t.to(self.dtype), w.to(self.dtype)).neg_()
        _, self.offset = self.shards.select_at_global_argmax(height, offset)

    def _bias_shift(self, cols) -> Tensor | None:
        """Returns teacher bias minus student bias `[C]`, or None. It is 0 where both biases exclude the token."""
        if self.bias_t is None:
            return None
        shift = self.bias_t[cols].to(self.dtype) - (0 if self.bias is None else self.bias[cols].to(self.dtype))
        return torch.nan_to_num(shift, nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    @property
    def scale(self) -> float:
        """Factor still to be applied to `difference()`. The sweep applies it when the difference is a bare matmul."""
        return 1 / self.spec.temperature if self.is_delta and not self.scaling.needs_logits else 1.0

    def student_and_difference(self, cols: slice) -> tuple[Tensor, Tensor]:
        """Returns `student` and `difference`. If `joins`, one product gives both, which packs the head once."""
        change = self._head_change(cols) if self.heads_near else None
        if not self.joins:
            kept = self.student(cols)
            return kept, self.difference(cols, kept)
        w = self.work.cast("head", self.weight[cols], self.spec.compute_dtype)
        both = torch.cat([self.rows, self.rows_t])
        s, d = matmul.logits(both, w, self.dtype, work=self.work, use="both").chunk(2)
        kept = self.scaling.keep(s, _cols(self.bias, cols))
        if change is None:
            return kept, self._shifted(d, cols)
        matmul.add_fp32(d, self.h_t[self.index], change)
        return kept, self.scaling.difference(kept, d)

    def _head_change(self, cols: slice) -> Tensor | None:
        """Returns the teacher's head minus the student's, `[C, H]`. Ends `heads_near` if it is large."""
        w, use = self.weight[cols], "change of the head"
        change = torch.sub(self.w_t[cols], w, out=self.work.empty(use, tuple(w.shape), w.dtype))
        self.heads_near = bool(change.norm(dim=1).amax() <= NEAR_HEAD * w.norm(dim=1).median())  # False for NaN
        if self.heads_near:
            return change
        self.work.forget(use)
        return None

    def difference(self, cols: slice, kept: Tensor) -> Tensor:
        """Returns the logit difference divided by `scale`, `[R, C]`, beside the student's `kept` logits."""
        if not self.is_delta:
            return _difference(self.scaling, kept, self._teacher_product(cols), self._teacher_bias(cols))
        d = self._difference_product(self.rows_t, cols, self.offset if self.rounds_difference else None)
        d = self._shifted(d, cols)
        return self.scaling.difference(kept, d) if self.scaling.needs_logits else d

    def _shifted(self, d: Tensor, cols: slice) -> Tensor:
        shift = self._bias_shift(cols)
        return d if shift is None else d.add_(shift)

    def _difference_product(self, rows: Tensor, cols: slice, offset: Tensor | None) -> Tensor:
        w = self.work.cast("head", self.weight[cols], self.spec.compute_dtype)
        w = self.work.cast("head of the difference", w, rows.dtype)
        return matmul.logits(rows, w, self.other_dtype, offset, self.work, "difference")


class StudentLogits(LinearGradients):
    """Computes one model's logits, for log-probabilities."""

    def block(self, cols: slice) -> Tensor:
        """Returns the kept logits (see `Scaling`) of the vocabulary entries `cols`, `[R, C]`."""
        w = self.work.cast("head", self.weight[cols], self.spec.compute_dtype)
        return self.scaling.keep(matmul.logits(self.rows, w, self.s_dtype, work=self.work), _cols(self.bias, cols))


class GivenLogits:
    """The interface of `LinearLogits` over the caller's logits. The gradient is `[N, V]`, like the logits."""

    is_delta = rounds_difference = is_plain = False
    mixing_bytes = 0
    may_be_infinite = True
    scales_late = False  # no product sums the rows' gradients
    grad_scale = None
    shards = Shards(None, 0, torch.device("cpu"))
    work = Workspace(torch.device("cpu"))

    def __init__(self, spec: DivergenceSpec, student_logits: Tensor, teacher_logits: Tensor):
        self.spec, self.student_logits, self.teacher_logits = spec, student_logits, teacher_logits
        self.num_rows, self.vocab = student_logits.shape
        self.device = student_logits.device
        self.scaling = Scaling(spec)
        self.dtype = self.s_dtype = accumulate_dtype(student_logits.dtype)
        self.grad = (
            torch.zeros_like(student_logits, dtype=gradient_dtype(student_logits.dtype)) if spec.any_grad else None
        )

    def scale_gradients(self, row_weight: Tensor | None) -> None:
        pass

    def load(self, index: Tensor) -> None:
        self.index = index

    def student(self, cols: slice) -> Tensor:
        return self.scaling.keep(self.student_logits[self.index, cols].to(self.dtype), None)

    def student_and_difference(self, cols: slice) -> tuple[Tensor, Tensor]:
        kept = self.student(cols)
        return kept, self.difference(cols, kept)

    def teacher(self, cols: slice) -> Tensor:
        return self.scaling.teacher(self.teacher_logits[self.index, cols].to(self.dtype), None)

    def difference(self, cols: slice, kept: Tensor) -> Tensor:
        return _difference(self.scaling, kept, self.teacher_logits[self.index, cols].to(self.dtype), None)

    def product_blocks(self, plan: ChunkPlan) -> list[slice]:
        return plan.blocks(self.vocab)

    def gradient_storage(self, block: Tensor) -> Tensor:
        return block

    def row_gradient(self, d: Tensor) -> Tensor:
        return d

    def take_gradient(self, cols: slice, g: Tensor, factor: None = None) -> None:
        self.grad[self.index, cols] = g.to(self.grad.dtype)

    def finish_rows(self, factor: None = None) -> None:
        pass

    def gradients(self) -> tuple[Tensor | None, None, None]:
        return self.grad, None, None


def _difference(scaling: Scaling, kept: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """Returns scaled teacher logits minus the student's, from the product `z` of the teacher's own head."""
    if scaling.softcap is None:
        return scaling.teacher(z, bias).sub_(kept)
    return scaling.difference(kept, scaling.raw(z, bias).sub_(kept))


def _cols(bias: Tensor | None, cols: slice) -> Tensor | None:
    return None if bias is None else bias[cols]
