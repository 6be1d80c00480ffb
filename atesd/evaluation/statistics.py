"""Statistics of an evaluation: Average@k, unbiased pass@k, maj@k, bootstrap intervals, paired differences.

These are formulas over arrays of verdicts, independent of models and files, and tested against enumeration. Every
metric is a mean over problems of one value per problem. The bootstrap resamples problems, since the samples of one
problem are not independent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = ["Estimate", "estimate", "majority_vote", "pass_at", "pass_at_levels"]

_AT_ONCE = 2_000_000  # values per bootstrap batch, which bounds memory


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its interval. `low` and `high` are None for one problem, which cannot be resampled."""

    value: float
    low: float | None
    high: float | None


def pass_at(j: int, num_correct: int, num_samples: int) -> float:
    """Returns unbiased pass@j of one problem: the probability that j of its n samples include a correct one.

    `1 - C(n - c, j) / C(n, j)` with c correct samples (Chen et al. 2021, arXiv 2107.03374), in integers until `/`.

    >>> pass_at(1, 3, 12), pass_at(12, 1, 12), pass_at(2, 1, 4)
    (0.25, 1.0, 0.5)
    """
    if not 1 <= j <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{j} of {num_correct} right among {num_samples} samples: needs 1 <= j <= n and 0 <= c <= n"
        )
    wrong, every = math.comb(num_samples - num_correct, j), math.comb(num_samples, j)
    return (every - wrong) / every


def pass_at_levels(k: int) -> list[int]:
    """Returns each j for which pass@j is reported: powers of two from 2 to k, and k. pass@1 equals Average@k.

    >>> pass_at_levels(12), pass_at_levels(1)
    ([2, 4, 8, 12], [])
    """
    powers = [2**i for i in range(1, k.bit_length()) if 2**i < k]
    return [*powers, k] if k > 1 else []


def majority_vote(votes: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Returns maj@k of one problem: 1 if the most frequent answer is correct, else 0.

    Args:
        votes: the answer of each sample, equal for equivalent answers. None abstains.
        correct: the verdict on each sample. All correct answers count as the same answer.

    If `n` answers tie for the most votes and one of them is correct, the value is `1 / n`. It therefore does not depend
    on the order of the samples.

    >>> majority_vote(["7", "7", "8"], [True, True, False]), majority_vote(["7", "8", None], [True, False, False])
    (1.0, 0.5)
    """
    right = object()
    counted = Counter(
        right if is_right else vote
        for vote, is_right in zip(votes, correct, strict=True)
        if is_right or vote is not None
    )
    if not counted:
        return 0.0
    most = max(counted.values())
    winners = [vote for vote, count in counted.items() if count == most]
    return (right in winners) / len(winners)


def estimate(
    values: np.ndarray, confidence: float = 0.95, num_bootstrap: int = 10_000, seed: int = 0
) -> list[Estimate]:
    """Returns the mean of each column with its bootstrap interval. All columns share the same resamples.

    Args:
        values: `(problems,)` or `(problems, metrics)`. For a paired comparison, pass the differences.
        confidence: probability that the interval covers the mean over the population of problems.

    This is the expanded percentile interval (Hesterberg 2015, arXiv 1411.5279). Plain percentiles are too narrow for
    few problems: with 8 simulated problems they cover 91 % instead of 95 %. The expanded interval widens them by
    Student's t and n / (n - 1). The interval has zero width if all problems have the same value: resampling cannot
    produce unobserved values.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    n, metrics = values.shape
    means = values.mean(axis=0)
    if n < 2:
        return [Estimate(float(mean), None, None) for mean in means]
    rng = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // (n * metrics))
    drawn = [
        values[rng.integers(0, n, (min(size, num_bootstrap - start), n))].mean(axis=1)
        for start in range(0, num_bootstrap, size)
    ]
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile((1 + confidence) / 2, n - 1))
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    return [Estimate(float(m), float(lo), float(hi)) for m, lo, hi in zip(means, low, high, strict=True)]


def t_quantile(p: float, degrees: int) -> float:
    """Student's t quantile: exact for 1 and 2 degrees, else within 1 %, by the Cornish-Fisher expansion (Abramowitz and
    Stegun 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**i for i, term in enumerate(terms))
