"""From raw logits to those a loss compares, in torch: softcap and temperatures.

A softcap hides what it saturates: in fp32 `tanh(10)` is 1, and its derivative and distance from other values are lost.
So chunks keep raw logits where there is a softcap, and everything here is computed from those. An entry at -inf is
excluded from the vocabulary and stays at -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LossSpec, accumulate_dtype


class Scaling:
    """The softcap and temperatures of a call. "Kept" logits are raw if there is a softcap, else divided by T_s."""

    def __init__(self, spec: LossSpec):
        self.softcap, self.temperature = spec.softcap, spec.temperature
        self.teacher_temperature = getattr(spec, "teacher_temperature", spec.temperature)
        self.dtype = accumulate_dtype(spec.compute_dtype)
        self.late = False  # whether the caller divides kept logits by T_s itself

    @property
    def needs_logits(self) -> bool:
        """Whether `difference` depends on the student's logits."""
        return self.softcap is not None or self.temperature != self.teacher_temperature

    def keep(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Returns kept logits from the head's product `z`, which may be overwritten, and its bias."""
        z = self.raw(z, bias)
        done = self.softcap is not None or self.temperature == 1 or self.late
        return z if done else z.div_(self.temperature)

    def raw(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Adds the bias in place. With a softcap, logits are at least fp32 from here on."""
        z = z if bias is None else z.add_(bias)
        return z if self.softcap is None else z.to(torch.promote_types(z.dtype, self.dtype))

    def student(self, kept: Tensor) -> Tensor:
        """Returns the student's scaled logits, `kept` itself without a softcap."""
        if self.softcap is None:
            return kept
        s = capped(kept, self.softcap)
        return s if self.temperature == 1 else s.div_(self.temperature)

    def teacher(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the teacher's scaled logits from the head's product `z`, which may be overwritten."""
        z = self.raw(z, bias)
        z = z if self.softcap is None else capped(z, self.softcap)
        return z if self.teacher_temperature == 1 else z.div_(self.teacher_temperature)

    def difference(self, kept: Tensor, d: Tensor) -> Tensor:
        """Returns scaled teacher logits minus scaled student logits, from the raw difference `d`, in place."""
        return self.tempered(kept, d if self.softcap is None else self.capped_difference(kept, d))

    def capped_difference(self, kept: Tensor, d: Tensor) -> Tensor:
        """Returns the teacher's capped logits minus the student's, from the raw difference `d`."""
        return capped_difference(kept, d, self.softcap).to(d.dtype)

    def tempered(self, kept: Tensor, d: Tensor) -> Tensor:
        """Returns scaled teacher logits minus scaled student logits, from the difference `d` before temperatures, in
        place."""
        if self.temperature != self.teacher_temperature:
            # (z + d) / T_t - z / T_s, with z = s T_s
            d.add_(self.student(kept), alpha=self.temperature - self.teacher_temperature)
        return d if self.teacher_temperature == 1 else d.div_(self.teacher_temperature)

    def slope(self, kept: Tensor) -> Tensor:
        """Returns the derivative of the capped logits by the raw ones, 1 - tanh^2."""
        e = torch.exp(kept.abs() * (-2 / self.softcap))
        return 4 * e / (1 + e) ** 2


def capped(z: Tensor, softcap: float) -> Tensor:
    """Returns `softcap * tanh(z / softcap)`, but -inf where `z` is."""
    return torch.where(torch.isneginf(z), z, softcap * torch.tanh(z / softcap))


def capped_difference(z: Tensor, d: Tensor, softcap: float) -> Tensor:
    """Returns `capped(z + d) - capped(z)`, to rounding however far both saturate; infinite where `d` is.

    With a = z / softcap, b = d / softcap and y = a + b it is softcap sinh(b) / (cosh(a) cosh(y)). In terms of
    exponentials of negative numbers, and as |b| = |a| + |y| or the difference of both, nothing cancels or overflows:

        2 softcap sign(b) (1 - exp(-2 |b|)) m / ((1 + A) (1 + Y)),     A = exp(-2 |a|),  Y = exp(-2 |y|),

    where m is the larger of A and Y if a and y have one sign, else 1.
    """
    y = z + d
    A, Y = (torch.exp(x.abs() * (-2 / softcap)) for x in (z, y))
    m = torch.where((z > 0) == (y > 0), torch.maximum(A, Y), 1.0)
    gap = torch.expm1(d.abs() * (-2 / softcap)).mul_(m).div_((1 + A) * (1 + Y))
    return torch.where(d.isinf(), d, torch.copysign(gap * (2 * softcap), d))
