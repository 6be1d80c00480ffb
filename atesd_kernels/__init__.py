"""Token-level teacher-student divergences and log-probabilities straight from hidden states.

No `[tokens, vocab]` tensor, gradients that stay right in bf16 when teacher and student nearly agree, any PyTorch
trainer. Start at `linear_divergence`.
"""

from .divergences import DivergenceTerm, register_divergence
from .exposure import exposure_logprobs
from .losses import divergence, linear_divergence, linear_logprobs
from .modules import Divergence, LinearDivergence, LinearLogprobs
from .stats import TokenStats

__all__ = [
    "Divergence",
    "DivergenceTerm",
    "LinearDivergence",
    "LinearLogprobs",
    "TokenStats",
    "divergence",
    "exposure_logprobs",
    "linear_divergence",
    "linear_logprobs",
    "register_divergence",
]
