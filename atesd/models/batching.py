"""Sequences of different lengths as one row without padding, and the order in which problems are visited.

Separate because it is the only place that knows how a batch is laid out: the student, the teacher and the probe all
call `pack` and `hidden_rows`, and no other file slices a hidden state. Nothing here makes the host wait for the GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Prompts with their responses, end to end in one row of `L` tokens.

    Attributes:
        input_ids: `(1, L)`.
        position_ids: `(1, L)`, starting again at 0 with each sequence.
        ends: `(1, 1, 1, sequences)` int32 on the CPU: where each sequence ends. It travels as the 4-D attention mask,
            which transformers hands to the attention function untouched.
        rows: `(N,)`, the positions whose hidden state predicts a response token.
        targets: `(N,)`, those response tokens.
        lengths: response length of each sequence; they sum to `N`.
        response_ids: `targets` as the host knows them.
        ids_after_rows: the input token after each of `rows`, as the host knows them.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    response_ids: tuple[int, ...]
    ids_after_rows: tuple[int, ...]


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """`host` on `device`. A copy from pageable memory waits for the GPU; this one goes through pinned memory."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def pack(prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device | str) -> PackedBatch:
    """Lay prompts and responses out end to end. Every prompt holds a token at least, since its last predicts the first
    response token."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: there is no position to predict its first response token from.")
    ids: list[int] = []
    answers: list[int] = []
    before_answers: list[int] = []  # the rows
    ends, lengths = [], tuple(map(len, responses))
    for prompt, response in zip(prompts, responses, strict=True):
        ids += prompt
        ids += response
        answers += response
        ends.append(len(ids))
        before_answers += range(len(ids) - len(response) - 1, len(ids) - 1)
    starts = [0, *ends[:-1]]
    inputs, targets, rows = as_tensor(ids), as_tensor(answers), as_tensor(before_answers)
    positions = torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])
    # one copy for all four; the targets come first, because Triton compiles a second kernel for an unaligned pointer
    parts = (targets, rows, inputs, positions)
    flat = to_device(torch.cat(parts), device)
    targets_there, rows_there, ids_there, positions_there = flat.split([len(part) for part in parts])
    return PackedBatch(
        input_ids=ids_there[None],
        position_ids=positions_there[None],
        ends=torch.tensor(ends, dtype=torch.int32).view(1, 1, 1, -1),
        rows=rows_there,
        targets=targets_there,
        lengths=lengths,
        response_ids=tuple(answers),
        ids_after_rows=tuple(ids[row + 1] for row in before_answers),
    )


def as_tensor(numbers: list[int]) -> Tensor:
    """int64. By way of an array: from a list torch takes ten times as long, and a GPU waits for a step's layout."""
    found = array("q", numbers)
    return torch.frombuffer(found, dtype=torch.long) if found else torch.empty(0, dtype=torch.long)


def assert_same_responses(*batches: PackedBatch) -> None:
    """Student, teacher and loss see the very same response token ids, or nothing is trained.

    For each batch the tokens that follow `rows` in its input are compared with the targets of the first one, on the
    host: comparing tensors would wait for the GPU.
    """
    expected = batches[0].response_ids
    for batch in batches:
        if not batch.ids_after_rows == batch.response_ids == expected:
            raise AssertionError("student and teacher do not see the same response token ids as the loss.")


def hidden_rows(backbone: Callable[..., Any], batch: PackedBatch) -> Tensor:
    """`(N, hidden)`: the hidden states that predict the response tokens; the head is never applied."""
    out = backbone(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.ends, use_cache=False
    )
    return out.last_hidden_state[0].index_select(0, batch.rows)


def chunks(count: int, size: int) -> Iterator[slice]:
    """`range(count)` in pieces of at most `size`: the micro-batches of a step."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class ProblemSampler:
    """Visits `count` problems in a new order each epoch.

    The order is a function of (seed, epoch), so `position`, the number of problems drawn so far, is all its state.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.position = count, seed, 0
        self.epoch, self.order = -1, []

    def draw(self, number: int) -> list[int]:
        indices = []
        for _ in range(number):
            epoch, offset = divmod(self.position, self.count)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator).tolist()
            indices.append(self.order[offset])
            self.position += 1
        return indices

    def peek(self, number: int) -> list[int]:
        """What the next `draw` will give."""
        position, indices = self.position, self.draw(number)
        self.position = position
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
