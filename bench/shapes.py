"""The shapes of real models, and inputs for them: SmolLM2's own hidden states, and made-up ones for models too large to
carry along."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from bench import smollm_states
from bench.entrants import DEVICE, Inputs


class Shape(NamedTuple):
    name: str
    hidden: int
    vocab: int

    @property
    def suffix(self) -> str:
        """What the names of its results end in."""
        return "" if self is SMOLLM2 else f"-{self.name.lower()}"


SMOLLM2 = Shape("SmolLM2-135M", 576, 49_152)
QWEN3 = tuple(Shape(f"Qwen3-{size}", hidden, 151_936) for size, hidden in (("1.7B", 2048), ("4B", 2560), ("8B", 4096)))
SHAPES = {shape.name: shape for shape in (SMOLLM2, *QWEN3)}
HERE = QWEN3 if DEVICE == "cuda" else (SMOLLM2,)
TOKENS = 8192 if DEVICE == "cuda" else 2048
MEAN_KL = 0.1


@cache
def inputs(shape: Shape, tokens: int) -> Inputs:
    """In fp32, on the device that is measured."""
    if shape is SMOLLM2:
        return smollm_states.solution_inputs(tokens, MEAN_KL).on(DEVICE)
    return synthetic(shape, tokens)


def synthetic(shape: Shape, tokens: int, mean_kl: float = MEAN_KL) -> Inputs:
    """Normalised hidden states and a head that gives logits a standard deviation of 3; the teacher is the student moved
    in a random direction as far as `mean_kl`."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, shape.hidden, device=DEVICE, generator=generator)

    student, weight = normal(tokens), normal(shape.vocab) * (3 / shape.hidden**0.5)
    targets = torch.randint(shape.vocab, (tokens,), device=DEVICE, generator=generator)
    some = slice(min(tokens, 256))  # enough to find the distance
    direction = 0.1 * normal(tokens)
    moved = smollm_states.teacher_at_kl(student[some], student[some] + direction[some], weight, mean_kl)
    scale = ((moved - student[some]).norm() / direction[some].norm()).item()
    return Inputs(student, weight, student + scale * direction, targets)
