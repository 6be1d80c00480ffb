"""Collectives for a head whose vocabulary is sharded over the ranks of a process group.

Each rank has a block of the head's rows, in rank order, and the same hidden states. A sweep over a shard gives a few
numbers per row (normalisers, sums, the largest logit). Ranks exchange these numbers, never logits. Without a group
every method returns its input, so the sweeps need no second version. Backend "torch" exchanges row vectors, backend
"triton" the partial results of the programs that share a row.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAMPLE = 16  # values of a row to compare across ranks


class Shards:
    """This rank's shard of the vocabulary, and the collectives over all shards.

    Args:
        group: name of the process group; None for a head that is not sharded.
        vocab: number of entries in this rank's shard.
        device: device of the tensors.

    Attributes:
        start: first entry of this rank's shard.
        vocab: number of entries in all shards.
        largest: number of entries in the largest shard.

    Raises:
        ValueError: if a rank has no rows.
    """

    def __init__(self, group: str | None, vocab: int, device: torch.device):
        self.start, self.vocab, self.largest, self.group, self.device = 0, vocab, vocab, None, device
        if group is not None:
            self.group = torch.distributed.distributed_c10d._resolve_process_group(group)
            sizes = [int(size) for size in self._gather(torch.tensor(vocab, device=device))]
            if not all(sizes):  # raised on every rank: a single rank that continues would hang
                raise ValueError(f"each rank needs at least one row of the head; the ranks of group= have {sizes}.")
            self.start, self.vocab, self.largest = sum(sizes[: self.group.rank()]), sum(sizes), max(sizes)

    def require_same(self, hidden: Tensor, mask: Tensor | None, options: str, processors: int) -> None:
        """Checks, by samples, that all ranks make the same call. If they did not, their collectives would not match.

        This catches a head sharded by FSDP2, whose ranks process different data.

        Args:
            hidden: `[N, H]`; compared by N and some values of one row.
            mask: `[N]`; compared by the number of tokens that count.
            options: compared by checksum.
            processors: a GPU's multiprocessors, over which backend "triton" splits rows; 0 for other backends.

        Raises:
            ValueError: on every rank, if anything differs.
        """
        sample = hidden[len(hidden) // 2 :][:1, :SAMPLE].flatten().double()
        mine = torch.nn.functional.pad(sample, (4, SAMPLE - len(sample)))
        mine[0] = len(hidden)
        mine[1] = len(hidden) if mask is None else mask.sum()
        mine[2], mine[3] = zlib.crc32(options.encode()), processors
        ranks = torch.stack(self._gather(mine)).cpu()
        rows, counted, checksums, multiprocessors = ranks[:, :4].long().T.tolist()
        values = ranks[:, 4:]
        # replicas of a model may differ by rounding; NaN counts as equal to NaN
        apart = (values - values[0]).abs() > 0.05 * values.abs().amax()
        needs = "a head sharded by its vocabulary needs"
        if len(set(rows)) > 1 or bool(apart.any()):
            raise ValueError(
                f"{needs} the same hidden states on every rank, but those of the ranks of group= differ ({rows} rows). "
                "If ranks process different data (FSDP2), pass the full head: weight.full_tensor()."
            )
        if len(set(counted)) > 1:
            raise ValueError(
                f"{needs} the same mask on every rank, but those of the ranks of group= count {counted} tokens."
            )
        if len(set(checksums)) > 1:
            raise ValueError(
                f"{needs} the same options on every rank (and hidden states that all require a gradient, or none), but "
                f"those of the ranks of group= differ. This rank has {options}."
            )
        if len(set(multiprocessors)) > 1:
            raise ValueError(
                f"{needs} GPUs of one kind for backend 'triton', but those of the ranks of group= have "
                f"{multiprocessors} multiprocessors. Use backend='torch'."
            )

    def _gather(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, value.contiguous(), group=self.group)
        return parts

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        torch.distributed.all_reduce(value, how, group=self.group)
        return value

    def sum(self, *vectors: Tensor) -> list[Tensor]:
        """Returns each vector `[R]`, summed over ranks (one all-reduce)."""
        if self.group is None:
            return list(vectors)
        return list(self._reduce(torch.stack(vectors), torch.distributed.ReduceOp.SUM))

    def local(self, entries: Tensor) -> Tensor:
        """Returns vocabulary entries as numbered in this shard. Those of other shards lie outside `[0, V_rank)`."""
        return entries - self.start if self.start else entries

    def logsumexp(self, vector: Tensor) -> Tensor:
        """Returns the normaliser over the full vocabulary, `[R]`, from that over each shard."""
        return vector if self.group is None else torch.stack(self._gather(vector)).logsumexp(0)

    def gather_programs(self, parts: Tensor, lowest: tuple[int, ...], neutral: float) -> Tensor:
        """Returns the partial results of the programs of all ranks, `[R, P, X]`, from this rank's `[R, P_rank, X]`.

        They are in the order of the vocabulary. P is filled up to a power of two, as a kernel loads them: there the
        positions `lowest` of X, which are maxima, hold `neutral`, and sums 0.
        """
        if self.group is None:
            return parts
        ranks = torch.cat(self._gather(parts), 1)
        rows, programs, size = ranks.shape
        out = ranks.new_zeros(rows, 1 << (programs - 1).bit_length(), size)
        out[:, :programs] = ranks
        for position in lowest:
            out[:, programs:, position] = neutral
        return out

    def sum_programs(self, sums: Tensor) -> Tensor:
        """Replaces each row's sums `[R, P, X]` by those of all ranks, in the first program's place; the rest are 0."""
        if self.group is not None:
            (total,) = self.sum(sums.sum(1))
            sums.zero_()
            sums[:, 0] = total
        return sums

    def select_at_global_argmax(self, height: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Returns the largest `height` over ranks and the `vectors` of the first rank that has it, for each row."""
        if self.group is None:
            return [height, *vectors]
        parts = torch.stack(self._gather(torch.stack([height, *(v.to(height.dtype) for v in vectors)])))
        best = parts[:, 0].argmax(0)
        found = parts.gather(0, best.expand(1, parts.shape[1], -1))[0]
        return [found[0], *(f.to(v.dtype) for f, v in zip(found[1:], vectors, strict=True))]

    def broadcast_from_first(self, vector: Tensor) -> Tensor:
        """Broadcasts the first rank's vector and returns it."""
        if self.group is not None:
            vector = vector.contiguous()
            torch.distributed.broadcast(vector, group=self.group, group_src=0)
        return vector

    def all(self, condition: bool, device: torch.device) -> bool:
        """Returns whether the condition is true on every rank, so that all ranks take the same branch."""
        return condition if self.group is None else bool(self.all_reduce_min(int(condition), device))

    def all_reduce_min(self, number: int, device: torch.device) -> int:
        if self.group is None:
            return number
        return int(self._reduce(torch.tensor(number, device=device), torch.distributed.ReduceOp.MIN))


def shard_of(name: str, head: Tensor | None, group: ProcessGroup | None) -> tuple[Any, ProcessGroup | None]:
    """Returns `(local shard, group)` of a head `[V, H]` or its bias `[V]`: the process group that shards its rows.

    A `DTensor` supplies its own group. Its gradient is again a DTensor.

    Raises:
        ValueError: if a DTensor is not sharded by its rows, or is sharded over another group than `group`.
        TypeError: if `head` is no tensor.
    """
    if head is not None:
        check_tensor(name, head)
    if not is_dtensor(head):
        return head, group
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = head.device_mesh, head.placements
    sharded = [axis for axis, placement in enumerate(placements) if placement != Replicate()]
    if len(sharded) > 1 or any(placements[axis] != Shard(0) for axis in sharded):
        raise ValueError(
            f"{name} is a DTensor with placements {placements}; a head may only be sharded by its rows (Shard(0)), "
            "over one mesh dimension. Redistribute it, or pass full_tensor()."
        )
    own = mesh.get_group(sharded[0]) if sharded else None
    if group is not None and own is not None and own.group_name != group.group_name:
        raise ValueError(f"group= is {group.group_name!r}, but {name} is sharded over {own.group_name!r}; omit group=.")
    return head.to_local(), own or group


def replicated_tensor(name: str, hidden: Tensor) -> Tensor:
    """Returns hidden states as a plain tensor that is the same on every rank.

    Raises:
        ValueError: if a DTensor is not replicated.
        TypeError: if `hidden` is no tensor.
    """
    check_tensor(name, hidden)
    if not is_dtensor(hidden):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {hidden.placements}, but every rank needs all of it; redistribute it "
            "to Replicate() first."
        )
    return hidden.to_local()


def is_dtensor(tensor: Any) -> bool:
    # avoids importing torch.distributed.tensor, which takes half a second
    return type(tensor).__name__ == "DTensor" and hasattr(tensor, "device_mesh")
