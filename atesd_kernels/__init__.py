"""Token-level teacher-student divergences and log-probabilities, computed from hidden states.

The losses materialise no `[tokens, vocab]` tensor. Their bf16 gradients stay accurate when teacher and student nearly
agree. They work with any PyTorch trainer. Start at `linear_divergence`.
"""

from .divergences import DivergenceTerm, register_divergence
from .exposure import exposure_logprobs
from .losses import divergence, linear_divergence, linear_logprobs
from .modules import Divergence, LinearDivergence, LinearLogprobs, LinearTopkDivergence, TopkDivergence
from .stats import TokenStats
from .topk import linear_topk_divergence, topk_divergence

__all__ = [
    "Divergence",
    "DivergenceTerm",
    "LinearDivergence",
    "LinearLogprobs",
    "LinearTopkDivergence",
    "TokenStats",
    "TopkDivergence",
    "divergence",
    "exposure_logprobs",
    "linear_divergence",
    "linear_logprobs",
    "linear_topk_divergence",
    "register_divergence",
    "topk_divergence",
]
