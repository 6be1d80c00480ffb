"""The random numbers of a response: a function of the run's seed and of the response's number in the run.

Separate from the engines because all of them promise it: neither the company in a batch, nor how many processes share
the step's problems, nor a restart decides what is sampled.
"""

from __future__ import annotations

import hashlib
from typing import Any


def seed_of(seed: int, number: int) -> int:
    """The seed of a run's response `number`: 48 bits that look nothing like the next one's."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")


class ResponseSeeds:
    """Numbers the responses of a run. Process `rank` of `processes` asks for the `rank`-th block of each step.

    Attributes:
        asked: responses that the whole run has asked for, all processes together.
    """

    def __init__(self, seed: int, rank: int = 0, processes: int = 1):
        self.seed, self.rank, self.processes, self.asked = seed, rank, processes, 0

    def following(self, count: int) -> tuple[int, ...]:
        """The seeds of this process's next `count` responses; the other processes ask for as many."""
        first = self.asked + self.rank * count
        return tuple(seed_of(self.seed, first + i) for i in range(count))

    def count(self, responses: int) -> None:
        """These are there: the next ones follow."""
        self.asked += responses * self.processes

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]
