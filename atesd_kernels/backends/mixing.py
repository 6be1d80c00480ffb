"""What the backends share to mix views of a teacher: one difference of hidden states, and biases without infinities."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed_difference(states: list[Tensor], student: Tensor, mix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `sum_m w_m (H_m - H_s)`, `[R, H]`, in `dtype`, from states `[R, H]` and weights `[M, R]`.

    Not `sum_m w_m H_m - H_s`: the student's part must cancel before it is rounded.
    """
    student = student.to(dtype)
    total = torch.zeros_like(student)
    for h, w in zip(states, mix.to(dtype), strict=True):
        total.addcmul_(h.to(dtype) - student, w[:, None])
    return total


class Biases:
    """Both sides' biases as finite numbers, beside the entries that the views exclude: no weight meets -inf.

    Attributes are None if no model has a bias.

    Attributes:
        student: `[V]`, 0 where the student's bias is -inf.
        teacher: `[M, V]`, 0 where the views exclude the entry.
        excluded: `[V]`, -inf there, else 0.
        shift: `teacher - student`, `[M, V]`; None if each view has the student's bias.
    """

    def __init__(self, student: Tensor | None, teacher: Tensor | None, views: int, dtype: torch.dtype):
        self.student = self.teacher = self.excluded = self.shift = None
        if student is None and teacher is None:
            return
        like = teacher[0] if student is None else student
        self.student = torch.zeros_like(like, dtype=dtype) if student is None else _finite(student, dtype)
        if teacher is None:
            self.teacher, excluding = self.student.expand(views, -1), like
        else:
            self.teacher, excluding = _finite(teacher, dtype), teacher[0]
            self.shift = self.teacher - self.student
        self.excluded = torch.zeros_like(self.student).masked_fill_(torch.isneginf(excluding), -torch.inf)


def _finite(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return bias.to(dtype).masked_fill(torch.isneginf(bias), 0.0)


def add_mixed(out: Tensor, rows: Tensor, mix: Tensor) -> Tensor:
    """Adds `sum_m w_m b_m` to `out` `[R, C]` in place, from `rows` `[M, C]` and weights `[M, R]`."""
    for b, w in zip(rows, mix, strict=True):
        out.addcmul_(b.to(out.dtype)[None], w.to(out.dtype)[:, None])
    return out
