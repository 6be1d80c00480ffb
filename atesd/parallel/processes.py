"""What the processes of a run tell each other. A process alone sends nothing, and gets back what it gives.

Separate from the loop, which reads the same for one process and for many. Every process calls every method, in the same
order: each is a message that all take part in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether to tell accelerate so: it lets processes on a CPU talk to each other only when it is told."""
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

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a step's items: a block, so that the responses to a problem stay together."""
        size = len(items) // self.count
        return items[self.rank * size : (self.rank + 1) * size]

    def turns(self, items: Sequence[T]) -> tuple[list[T], int]:
        """Every `count`-th item, and how many of them count: at the end there may be one that another process has.

        All get equally many, since sharded weights make a forward pass a message as well.
        """
        padded = -(-len(items) // self.count) * self.count
        mine = range(self.rank, padded, self.count)
        return [items[i % len(items)] for i in mine], sum(i < len(items) for i in mine)

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.count > 1 else value

    def total(self, *values: float) -> list[float]:
        """The sum over processes of each number, in float64."""
        if self.count == 1:
            return list(values)
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """The mean over processes of each number. All have the same names."""
        return {n: total / self.count for n, total in zip(numbers, self.total(*numbers.values()), strict=True)}

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def gather(self, values: Tensor) -> Tensor:
        """`(n,)` of each process, n its own -> all of them end to end, in order of rank."""
        if self.count == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        rows = self.accelerator.gather(self.accelerator.pad_across_processes(values)).view(self.count, -1)
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def told(self, decide: Callable[..., T], *arguments: Any) -> T:
        """What `decide` returns on the main process, where alone it is called. Any plain value."""
        if self.count == 1:
            return decide(*arguments)
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([decide(*arguments) if self.is_main else None])[0]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()
