"""The seed of a response: a function of the run's seed and of the response's number in the run.

All engines use it. So sampling does not depend on the other responses in a batch, on the number of processes, or on a
restart.
"""

from __future__ import annotations

import hashlib
from typing import Any


def seed_of(seed: int, number: int) -> int:
    """Returns the seed of a run's response `number`: 48 bits of a hash, so that neighbours are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")


class ResponseSeeds:
    """Numbers the responses of a run. Process `rank` of `processes` takes the `rank`-th block of each step.

    Attributes:
        asked: number of responses requested so far, over all processes.
    """

    def __init__(self, seed: int, rank: int = 0, processes: int = 1):
        self.seed, self.rank, self.processes, self.asked = seed, rank, processes, 0

    def following(self, count: int) -> tuple[int, ...]:
        """Returns the seeds of this process's next `count` responses. Other processes must request as many."""
        first = self.asked + self.rank * count
        return tuple(seed_of(self.seed, first + i) for i in range(count))

    def count(self, responses: int) -> None:
        """Advances past `responses` complete responses of each process."""
        self.asked += responses * self.processes

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]
