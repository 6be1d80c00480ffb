"""The head of a causal language model as the losses take it: a matrix, with bias, softcap and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class HeadError(ValueError):
    """A model whose hidden states and head do not give its logits. The message says why, and what to do."""


@dataclass(frozen=True)
class HeadSpec:
    """`logits = softcap(scale * (hidden @ weight.T + bias))`, with `softcap(z) = softcap * tanh(z / softcap)`.

    Attributes:
        weight: `(vocab, hidden)`, the model's own parameter, not a copy.
        bias: `(vocab,)` or None.
        softcap: final logit softcap (Gemma) or None.
        scale: factor on the logits (Cohere, Granite, Falcon-H1); 1.0 for most models.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def temperature(self, temperature: float) -> float:
        """Returns a temperature that includes `scale`: `softmax(scale * z / T) = softmax(z / (T / scale))`."""
        return temperature / self.scale

    def divergence_options(self, temperature: float = 1.0, teacher: HeadSpec | None = None) -> dict[str, Any]:
        """Returns the options of `linear_divergence` for this head: biases, softcap, and scales as temperatures.

        Args:
            temperature: of both distributions.
            teacher: the teacher's head (default: this one).

        Raises:
            HeadError: if the two heads have different softcaps. The losses take only one.
        """
        teacher = self if teacher is None else teacher
        if teacher._inner_softcap != self._inner_softcap:
            raise HeadError(
                f"student and teacher have different logit softcaps ({self.softcap} and {teacher.softcap}): "
                "linear_divergence takes one softcap for both. Use a teacher of the same family."
            )
        return {
            "temperature": self.temperature(temperature),
            "teacher_temperature": teacher.temperature(temperature),
            "softcap": self._inner_softcap,
            "student_bias": self.bias,
            "teacher_bias": teacher.bias,
        }

    def logprob_options(self, temperature: float = 1.0) -> dict[str, Any]:
        """Returns the options of `linear_logprobs` for this head."""
        return {"temperature": self.temperature(temperature), "softcap": self._inner_softcap, "bias": self.bias}

    @property
    def _inner_softcap(self) -> float | None:
        """The losses cap before they scale: cap tanh(scale z / cap) = scale (cap/scale) tanh(z / (cap/scale))."""
        return self.softcap / self.scale if self.softcap else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns dense logits `[..., V]`. Use it for checks and single rows, not for a batch."""
        return self.transform(nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, z: Tensor) -> Tensor:
        """Returns logits from `z = hidden @ weight.T + bias`: scaled, then capped."""
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
