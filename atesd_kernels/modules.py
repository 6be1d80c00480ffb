"""The losses as `nn.Module`: pass options to the constructor and tensors to each call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import losses, topk


class _Loss(nn.Module):
    function: staticmethod

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(self, *tensors: Tensor | Sequence[Tensor | None] | None, **arguments):
        return self.function(*tensors, **{**self.options, **arguments})


class LinearDivergence(_Loss):
    """`linear_divergence` as a module. The constructor takes its options; each call takes `mask` and other tensors.
    `teacher_mix` may be an option, or differ from call to call.

    Example:
        >>> from atesd_kernels import LinearDivergence
        >>> LinearDivergence(divergence="jsd", beta=0.5)
        LinearDivergence(divergence='jsd', beta=0.5)
    """

    function = staticmethod(losses.linear_divergence)


class Divergence(_Loss):
    """`divergence` (from logits) as a module."""

    function = staticmethod(losses.divergence)


class LinearLogprobs(_Loss):
    """`linear_logprobs` as a module."""

    function = staticmethod(losses.linear_logprobs)


class LinearTopkDivergence(_Loss):
    """`linear_topk_divergence` as a module."""

    function = staticmethod(topk.linear_topk_divergence)


class TopkDivergence(_Loss):
    """`topk_divergence` (from logits) as a module."""

    function = staticmethod(topk.topk_divergence)
