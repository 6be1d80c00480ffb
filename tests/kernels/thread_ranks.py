"""A process group whose ranks are threads of one process, for kernels that run where processes cannot be started.

The ranks take turns: one computes until it waits for the others. So nothing else needs to be safe among threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 600.0


class ThreadRanks(dist.ProcessGroup):
    """`size` ranks; `monkeypatch` replaces the collectives that the losses call while the test runs."""

    def __init__(self, size: int, monkeypatch):
        super().__init__(0, size)
        self.turn, self.met = threading.Lock(), threading.Barrier(size, timeout=SECONDS)
        self.mine = threading.local()
        self.values: list[Any] = [None] * size
        monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", lambda name: self)
        for name in ("all_gather", "all_reduce", "broadcast"):
            monkeypatch.setattr(dist, name, getattr(self, f"_{name}"))

    @property
    def group_name(self) -> str:
        return "threads"

    def rank(self) -> int:
        return self.mine.rank

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Returns `function(rank)` of every rank, or raises the first rank's error."""
        results: list[Any] = [None] * self.size()
        errors: list[BaseException] = []
        modes = torch.overrides._get_current_function_mode_stack()  # a thread's own: the sanitizer's is the caller's

        def one(rank: int) -> None:
            self.mine.rank = rank
            try:
                with self.turn, contextlib.ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode)
                    results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.met.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.met.wait()
        finally:
            self.turn.acquire()

    def _exchange(self, value: Tensor) -> list[Tensor]:
        """Returns every rank's value."""
        self.values[self.rank()] = value.clone()
        self._meet()
        found = list(self.values)
        self._meet()
        return found

    def _all_gather(self, out: list[Tensor], value: Tensor, group: Any) -> None:
        for mine, found in zip(out, self._exchange(value), strict=True):
            mine.copy_(found)

    def _all_reduce(self, value: Tensor, op: Any, group: Any) -> None:
        ranks = torch.stack(self._exchange(value))
        value.copy_(ranks.sum(0) if op == dist.ReduceOp.SUM else ranks.amin(0))

    def _broadcast(self, value: Tensor, group: Any, group_src: int) -> None:
        value.copy_(self._exchange(value)[group_src])
