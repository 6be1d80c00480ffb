"""Communication between the processes of a run. With one process every method returns its input.

All methods but `local_block` and `padded_round_robin` are collectives: every process calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from atesd.errors import AtesdError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether training runs on the CPU. accelerate must be told: it sets up communication on a CPU only then."""
    return not torch.accelerator.is_available()


class Processes:
    """The processes that train together.

    Args:
        accelerator: or its state; None for a process alone.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
        is_main: whether this is the one that decides and writes.
    """

    def __init__(self, accelerator: Accelerator | PartialState | None = None):
        self.accelerator = accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1
        self.is_main = self.rank == 0

    def local_block(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous block of a step's items, so that the responses to a problem stay together."""
        size = len(items) // self.count
        return items[self.rank * size : (self.rank + 1) * size]

    def padded_round_robin(self, items: Sequence[T]) -> tuple[list[T], int]:
        """Every `count`-th item from this rank on, padded so that all ranks get equally many.

        With sharded weights a forward is a collective, so all ranks need the same number. Returns the items, and how
        many of them are not padding. Padding repeats items of other ranks.
        """
        padded = -(-len(items) // self.count) * self.count
        mine = range(self.rank, padded, self.count)
        return [items[i % len(items)] for i in mine], sum(i < len(items) for i in mine)

    def all_reduce(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.count > 1 else value

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each number over the processes, in float64."""
        if self.count == 1:
            return list(values)
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()

    def all_reduce_mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Average each number over the processes, which all have the same names."""
        return {n: total / self.count for n, total in zip(numbers, self.all_reduce_sum(*numbers.values()), strict=True)}

    def any(self, flag: bool) -> bool:
        return self.all_reduce_sum(float(flag))[0] > 0

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate each process's `(n,)` values in order of rank; n may differ."""
        if self.count == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        rows = self.accelerator.gather(self.accelerator.pad_across_processes(values)).view(self.count, -1)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def broadcast_from_main(self, decide: Callable[..., T], *arguments: Any) -> T:
        """Call `decide` on the main process only and return its result, any plain value, on every process.

        If it raises an AtesdError, every process raises it: none is left waiting.
        """
        if self.count == 1:
            return decide(*arguments)
        from accelerate.utils import broadcast_object_list

        result = error = None
        if self.is_main:
            try:
                result = decide(*arguments)
            except AtesdError as refusal:
                error = refusal
        result, message = broadcast_object_list([result, None if error is None else str(error)])
        if message is not None:
            raise error or AtesdError(message)
        return result

    def barrier(self) -> None:
        """Wait until every process gets here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()
