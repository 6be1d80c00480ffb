"""Backend "cpp" for log-probabilities: one chunk's rows, with C++ for all that is not a product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpp import library
from ..planning import ChunkPlan
from ..spec import LogprobSpec
from .cpp_chunk import put
from .logit_source import StudentLogits


class CppLogprobChunk:
    """As `torch_logprobs.LogprobChunk`, but computes the gradient at once. Row vectors are `[R]`."""

    def __init__(
        self,
        spec: LogprobSpec,
        source: StudentLogits,
        plan: ChunkPlan,
        buffer: Tensor,
        target: Tensor,
        weight: Tensor | None,
    ):
        self.source, self.plan = source, plan
        z = buffer[: len(target) * source.vocab].view(len(target), -1)
        source.scaling.late = True
        for cols in source.product_blocks(plan):
            with source.work.lending(logits=z[:, cols]):
                block = source.block(cols)
            put(block, z[:, cols])
        scale = 1 / spec.temperature
        self.at_target = z.gather(1, target[:, None])[:, 0] * scale
        self.factor = torch.full_like(self.at_target, scale)
        for f in (weight, source.grad_scale):
            self.factor = self.factor if f is None else self.factor * f
        self.late = source.scales_late
        self.out = source.row_gradient(z) if spec.any_grad else None
        factor = torch.ones_like(self.factor) if self.late else self.factor
        self.top, self.lse, self.entropy = library.logprobs(z, self.out, scale, factor)
        if self.out is not None:  # 1 - q is rounded once
            at_target = -torch.expm1(self.at_target - self.lse) * factor
            self.out[torch.arange(len(target)), target] = at_target.to(self.out.dtype)  # scatter_ copies all of bf16

    def stats(self, value: Tensor) -> Tensor:
        zero = torch.zeros_like(self.lse)
        return torch.stack([zero, self.entropy, zero, value, zero, (self.top - self.lse).exp(), zero])

    def gradient(self) -> None:
        """Passes d log q[target] / d z = (1[j = target] - q_j) / temperature, times the row's weight, to the source."""
        for cols in self.plan.blocks(self.source.vocab):
            self.source.take_gradient(cols, self.out[:, cols])
        self.source.finish_rows(self.factor if self.late else None)
