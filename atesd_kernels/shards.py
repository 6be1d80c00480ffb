"""A head whose vocabulary is sharded over the ranks of a process group: what the ranks tell each other.

Each rank holds some rows of the head, in the order of ranks, and the same hidden states. A sweep over its share leaves
a few numbers a row (normalisers, sums, the largest logit): those are exchanged, logits never are. Without a group every
method gives back what it was given, so that the sweeps are written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAMPLE = 16  # values of a row that are compared over ranks


class Shards:
    """This rank's share of the vocabulary.

    Args:
        group: name of the process group; None for a head that is whole.
        vocab: entries of this rank's share.
        device: where the tensors are.

    Attributes:
        start: the first entry of this rank's share.
        vocab: entries of all shares together.

    Raises:
        ValueError: a rank has no row.
    """

    def __init__(self, group: str | None, vocab: int, device: torch.device):
        self.start, self.vocab, self.group = 0, vocab, None
        if group is not None:
            self.group = torch.distributed.distributed_c10d._resolve_process_group(group)
            sizes = [int(size) for size in self._gather(torch.tensor(vocab, device=device))]
            if not all(sizes):  # said on every rank: one that went on alone would wait for the others
                raise ValueError(f"each rank needs a row of the head, but the ranks of group= hold {sizes} rows.")
            self.start, self.vocab = sum(sizes[: self.group.rank()]), sum(sizes)

    def require_same(self, hidden: Tensor) -> None:
        """Refuse, on every rank, hidden states `[N, H]` that are not those of the other ranks: a sample is compared.

        A head that FSDP2 has sharded looks the same, but its ranks hold different data.

        Raises:
            ValueError: another number of rows, or other values.
        """
        if self.group is None:
            return
        sample = hidden[len(hidden) // 2 :][:1, :SAMPLE].flatten().double()
        mine = torch.nn.functional.pad(sample, (1, SAMPLE - len(sample)))
        mine[0] = len(hidden)
        ranks = torch.stack(self._gather(mine))
        rows, values = ranks[:, 0], ranks[:, 1:]
        # models that are run redundantly may differ by rounding, and NaN does not differ from NaN
        apart = (values - values[0]).abs() > 0.05 * values.abs().amax()
        if bool((rows != rows[0]).any() | apart.any()):
            raise ValueError(
                "over a head sharded by its vocabulary every rank passes the same hidden states, but those of the "
                f"ranks of group= differ ({[int(n) for n in rows]} rows). Where ranks hold different data (FSDP2), "
                "pass the whole head: weight.full_tensor()."
            )

    def _gather(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, value.contiguous(), group=self.group)
        return parts

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        torch.distributed.all_reduce(value, how, group=self.group)
        return value

    def sum(self, *vectors: Tensor) -> list[Tensor]:
        """Each vector, summed over ranks."""
        if self.group is None:
            return list(vectors)
        return list(self._reduce(torch.stack(vectors), torch.distributed.ReduceOp.SUM))

    def logsumexp(self, vector: Tensor) -> Tensor:
        """The normaliser over the whole vocabulary from that over each share."""
        return vector if self.group is None else torch.stack(self._gather(vector)).logsumexp(0)

    def at_largest(self, height: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Row by row, the largest `height` over ranks and what `vectors` are on the rank that has it (the first)."""
        if self.group is None:
            return [height, *vectors]
        parts = torch.stack(self._gather(torch.stack([height, *(v.to(height.dtype) for v in vectors)])))
        best = parts[:, 0].argmax(0)
        found = parts.gather(0, best.expand(1, parts.shape[1], -1))[0]
        return [found[0], *(f.to(v.dtype) for f, v in zip(found[1:], vectors, strict=True))]

    def of_first(self, vector: Tensor) -> Tensor:
        """The first rank's vector."""
        if self.group is not None:
            vector = vector.contiguous()
            torch.distributed.broadcast(vector, group=self.group, group_src=0)
        return vector

    def all(self, condition: bool, device: torch.device) -> bool:
        """Whether it holds on every rank: all of them go the same way."""
        return condition if self.group is None else bool(self.least(int(condition), device))

    def least(self, number: int, device: torch.device) -> int:
        if self.group is None:
            return number
        return int(self._reduce(torch.tensor(number, device=device), torch.distributed.ReduceOp.MIN))


def backend_for(group: ProcessGroup | None, backend: str) -> str:
    """The backend that knows of shards, where the caller leaves the choice open."""
    return "torch" if group is not None and backend == "auto" else backend


def shard_of(name: str, head: Tensor | None, group: ProcessGroup | None) -> tuple[Any, ProcessGroup | None]:
    """A head, or its bias, as this rank holds it, and the group over which its rows are sharded.

    A `DTensor` names its own group; its gradient comes back as a DTensor.

    Raises:
        ValueError: a DTensor that is sharded otherwise than by its rows, or over another group than `group`.
    """
    if not is_dtensor(head):
        return head, group
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = head.device_mesh, head.placements
    sharded = [axis for axis, placement in enumerate(placements) if placement != Replicate()]
    if len(sharded) > 1 or any(placements[axis] != Shard(0) for axis in sharded):
        raise ValueError(
            f"{name} is a DTensor with placements {placements}; a head may be sharded by its rows (Shard(0)) over one "
            "mesh dimension. Redistribute it, or pass full_tensor()."
        )
    own = mesh.get_group(sharded[0]) if sharded else None
    if group is not None and own is not None and own.group_name != group.group_name:
        raise ValueError(
            f"group= is {group.group_name!r}, but {name} is sharded over {own.group_name!r}; leave it out."
        )
    return head.to_local(), own or group


def whole(name: str, hidden: Tensor) -> Tensor:
    """Hidden states as a plain tensor, of which every rank holds all.

    Raises:
        ValueError: a DTensor that is not replicated.
    """
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {hidden.placements}; every rank needs all of it: redistribute it to "
            "Replicate() first."
        )
    return hidden.to_local()


def is_dtensor(tensor: Any) -> bool:
    # torch.distributed.tensor takes half a second to import: whoever holds a DTensor has imported it
    return type(tensor).__name__ == "DTensor" and hasattr(tensor, "device_mesh")
