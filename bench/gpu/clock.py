"""Time and memory of a call on the GPU. On a CPU (dry runs) the clock is the wall's and memory is 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import timing


def milliseconds(function: Callable[[], object], rounds: int = 5, warm_up: int = 2) -> list[float]:
    """Of each call, in the order they were made."""
    for _ in range(warm_up):
        function()
    return [1e3 * timing.timed(function)[0] for _ in range(rounds)]


def extra_bytes(function: Callable[[], object]) -> int:
    """The most memory in use during a call, beyond what was in use before it. What the call returns counts.

    The allocator keeps these counts on the host: nothing waits.
    """
    if not torch.cuda.is_available():
        function()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def first_line(error: Exception) -> str:
    """An error as a table names it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
