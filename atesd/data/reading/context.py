"""Maps an exposure alpha to the part of the reference that the teacher reads.

This is the method's definition: the first floor(alpha*m) segments, and always the answer. A reference may name another
order, as a control. This file works on text; tokens and chat templates are in ``prompts.py``.
"""

from __future__ import annotations

import math

from atesd.data.segmentation import Reference

__all__ = ["exposed_segments", "exposed_text", "num_exposed"]

# An alpha this close below k/m counts as k/m. Covers float32 (0.7 is 0.69999999) and products such as 0.29 * 100.
ALPHA_TOLERANCE = 1e-7


def num_exposed(alpha: float, num_segments: int) -> int:
    """Returns ``floor(alpha * m)``, the number of ``m = num_segments`` segments that the teacher reads.

    The result is 0 at ``alpha = 0``, ``m`` at ``alpha = 1``, and never decreases with alpha.

    >>> num_exposed(0.3, 10), num_exposed(0.29, 100), num_exposed(0.99, 4), num_exposed(1.0, 4)
    (3, 29, 3, 4)

    Raises ValueError if alpha is NaN or outside [0, 1], or if ``num_segments`` is negative.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    if num_segments < 0:
        raise ValueError(f"num_segments must not be negative, got {num_segments}")
    return min(num_segments, math.floor((alpha + ALPHA_TOLERANCE) * num_segments))


def exposed_segments(reference: Reference, alpha: float) -> list[int]:
    """Returns the numbers of the ``floor(alpha * m)`` exposed segments, ascending.

    >>> reference = Reference(segments=("a ", "b ", "c "), answer="1", order=(2, 0, 1))
    >>> exposed_segments(reference, 0.4), exposed_segments(reference, 0.7)
    ([2], [0, 2])
    """
    m = len(reference.segments)
    return sorted((reference.order or range(m))[: num_exposed(alpha, m)])


def exposed_text(reference: Reference, alpha: float) -> str:
    r"""Returns the exposed segments verbatim, in the solution's order; at ``alpha = 1`` the solution with its tail.

    The tail is the sentence or line that states the answer. Below alpha = 1 it is omitted: it could reveal the last
    step of the working, and the prompt template gives the answer separately.

    >>> reference = Reference(segments=("2 + 3 = 5.\n", "Twice that is 10.\n"), answer="10", tail="#### 10")
    >>> exposed_text(reference, 0.0), exposed_text(reference, 0.5)
    ('', '2 + 3 = 5.\n')
    >>> exposed_text(reference, 1.0) == reference.solution
    True
    """
    if is_full(alpha):
        return reference.solution
    return "".join(reference.segments[number] for number in exposed_segments(reference, alpha))


def is_full(alpha: float) -> bool:
    """Whether ``alpha`` is 1 within ``ALPHA_TOLERANCE``, i.e. the teacher reads the full solution."""
    return alpha >= 1.0 - ALPHA_TOLERANCE
