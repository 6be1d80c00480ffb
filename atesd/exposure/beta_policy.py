"""The distribution over exposures: an MLP from the training state to Beta(a, b), its sampling, its REINFORCE loss.

This file has only the mathematics, in float64. The controller decides when to sample and when to learn.
"""

import math

import torch
from torch import nn
from torch.distributions import Beta

from atesd.exposure.signals import SIGNAL_NAMES


class BetaPolicy(nn.Module):
    """pi(alpha | s) = Beta(a, b), (a, b) = 1 + softplus(f_phi(s)), f_phi an MLP with one tanh layer.

    a, b > 1 keeps every density unimodal. The last layer starts with zero weights and bias softplus^-1(1), so every
    state starts at Beta(2, 2). `generator` initialises the first layer; the global random state does not change.

    >>> a, b = BetaPolicy()(torch.zeros(1, 6, dtype=torch.float64))
    >>> round(a.item(), 6), round(b.item(), 6)
    (2.0, 2.0)
    """

    def __init__(
        self, num_signals: int = len(SIGNAL_NAMES), hidden_size: int = 32, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        # skip_init: nn.Linear's own initialisation would use the global generator
        self.hidden = nn.utils.skip_init(nn.Linear, num_signals, hidden_size, dtype=torch.float64)
        self.output = nn.utils.skip_init(nn.Linear, hidden_size, 2, dtype=torch.float64)
        with torch.no_grad():
            bound = 1 / math.sqrt(num_signals)
            self.hidden.weight.uniform_(-bound, bound, generator=generator)
            self.hidden.bias.uniform_(-bound, bound, generator=generator)
            self.output.weight.zero_()
            self.output.bias.fill_(math.log(math.expm1(1.0)))  # softplus^-1(1)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps state (N, num_signals) to a (N,) and b (N,)."""
        a, b = (1 + nn.functional.softplus(self.output(torch.tanh(self.hidden(state))))).unbind(-1)
        return a, b

    def distribution(self, state: torch.Tensor) -> Beta:
        """Returns pi(.|s) for state (N, num_signals)."""
        return Beta(*self(state), validate_args=False)


def sample_beta(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Samples alpha ~ Beta(a, b), (N,), with `generator` (torch's Beta.sample takes no generator)."""
    # x / (x + y) ~ Beta(a, b) for x ~ Gamma(a), y ~ Gamma(b)
    x = torch._standard_gamma(a, generator=generator)
    y = torch._standard_gamma(b, generator=generator)
    return (x / (x + y)).clamp(1e-6, 1 - 1e-6)  # the clamp keeps log pi finite


def reinforce_loss(
    pi: Beta,
    samples: torch.Tensor,
    advantages: torch.Tensor,
    share: torch.Tensor,
    entropy_target: float,
    entropy_coef: float,
) -> torch.Tensor:
    """Returns -(1/B) sum A log pi(alpha|s) + c_t max(0, Entropy - H_target)^2, a scalar.

    samples, advantages, share: (N,), one for each unclipped sample. `share` sums to one and is 1/B if every decision
    has one sample. Entropy is the mean over the samples' states, with the same shares.
    """
    # log pi is that of the unclipped sample: clipping is part of the environment, and only the density that produced
    # the sample gives an unbiased gradient (at a clip boundary the clipped action has a point mass and no density).
    gain = (share * advantages * pi.log_prob(samples)).sum()
    excess = torch.clamp((share * pi.entropy()).sum() - entropy_target, min=0)
    return -gain + entropy_coef * excess**2
