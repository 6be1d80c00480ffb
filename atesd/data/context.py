"""From an exposure alpha to the part of the reference a teacher reads.

Separate from ``prompts.py`` because this is the method's definition (floor(alpha*m) segments, the answer always kept),
while prompts are wording. Nothing here knows about tokens or chat templates.
"""

from __future__ import annotations

import math

from atesd.data.segmentation import Reference

__all__ = ["exposed_text", "num_exposed"]

# An alpha this close below k/m counts as k/m: covers float32 (0.7 is 0.69999999) and products such as 0.29 * 100.
ALPHA_TOLERANCE = 1e-7


def num_exposed(alpha: float, num_segments: int) -> int:
    """``floor(alpha * m)``: how many of ``m = num_segments`` segments the teacher reads.

    ``alpha = 1`` gives ``m``, ``alpha = 0`` gives 0, and the result never falls when alpha rises.

    >>> num_exposed(0.3, 10), num_exposed(0.29, 100), num_exposed(0.99, 4), num_exposed(1.0, 4)
    (3, 29, 3, 4)

    Raises ValueError for an alpha outside [0, 1] (NaN included) or a negative number of segments.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    if num_segments < 0:
        raise ValueError(f"num_segments must not be negative, got {num_segments}")
    return min(num_segments, math.floor((alpha + ALPHA_TOLERANCE) * num_segments))


def exposed_text(reference: Reference, alpha: float) -> str:
    r"""The first ``floor(alpha * m)`` segments verbatim; at ``alpha = 1`` the whole solution, its tail included.

    Below 1 the tail (the sentence or line that states the answer) is left out: the answer reaches the teacher on a line
    of its own, and a partial reference must not give away the last step of the working with it.

    >>> reference = Reference(segments=("2 + 3 = 5.\n", "Twice that is 10.\n"), answer="10", tail="#### 10")
    >>> exposed_text(reference, 0.0), exposed_text(reference, 0.5)
    ('', '2 + 3 = 5.\n')
    >>> exposed_text(reference, 1.0) == reference.solution
    True
    """
    if is_full(alpha):
        return reference.solution
    return "".join(reference.segments[: num_exposed(alpha, len(reference.segments))])


def is_full(alpha: float) -> bool:
    """Whether ``alpha`` is 1, within ``ALPHA_TOLERANCE``: the teacher then reads the whole solution."""
    return alpha >= 1.0 - ALPHA_TOLERANCE
