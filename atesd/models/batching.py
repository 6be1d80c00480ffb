"""Packs sequences of different lengths into one row without padding, and samples the order of problems.

Only this file knows the layout of a batch. The student, the teacher and the probe all call `pack` and `hidden_rows`;
no other file slices hidden states. Nothing here synchronises the host with the GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atesd_kernels.integrations.backbone import AuxLoss, aux_loss_of


@dataclass(frozen=True)
class PackedBatch:
    """Prompts and responses, concatenated into one row of `L` tokens.

    Attributes:
        input_ids: `(1, L)`.
        position_ids: `(1, L)`. Positions restart at 0 for each sequence.
        ends: `(1, 1, 1, sequences)` int32 on the CPU: the end offset of each sequence. Passed as the 4-D attention
            mask, which transformers forwards unchanged to the attention function.
        rows: `(N,)`, the positions whose hidden states predict the response tokens that count.
        targets: `(N,)`, these tokens.
        lengths: their number in each sequence; the sum is `N`.
        response_ids: `targets`, on the host.
        ids_after_rows: the input token after each of `rows`, on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    response_ids: tuple[int, ...]
    ids_after_rows: tuple[int, ...]

    @property
    def last_positions(self) -> Tensor:
        """`(sequences,)` on the CPU: the position of the last token of each sequence."""
        return self.ends.flatten().long() - 1


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """Copies `host` to `device` through pinned memory: a copy from pageable memory would synchronise with the GPU."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def pack(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    device: torch.device | str,
    masks: Sequence[Sequence[int] | None] | None = None,
) -> PackedBatch:
    """Concatenates prompts and responses into one row. A prompt needs at least one token: the last token of the prompt
    predicts the first token of the response.

    A response token whose entry in `masks` is 0 is read like any other, and has no row: it counts nowhere. None: all
    count.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: no position predicts its first response token.")
    ids: list[int] = []
    answers: list[int] = []
    before_answers: list[int] = []  # these become `rows`
    ends: list[int] = []
    lengths: list[int] = []
    for prompt, response, mask in zip(prompts, responses, masks or [None] * len(prompts), strict=True):
        ids += prompt
        ids += response
        ends.append(len(ids))
        first = len(ids) - len(response)
        counted = range(len(response)) if mask is None else [i for i, one in enumerate(mask) if one]
        answers += [response[i] for i in counted]
        before_answers += [first + i - 1 for i in counted]
        lengths.append(len(counted))
    starts = [0, *ends[:-1]]
    inputs, targets, rows = as_tensor(ids), as_tensor(answers), as_tensor(before_answers)
    positions = torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])
    # One copy for all four tensors. Targets come first: Triton compiles a second kernel for an unaligned pointer.
    parts = (targets, rows, inputs, positions)
    flat = to_device(torch.cat(parts), device)
    targets_there, rows_there, ids_there, positions_there = flat.split([len(part) for part in parts])
    return PackedBatch(
        input_ids=ids_there[None],
        position_ids=positions_there[None],
        ends=torch.tensor(ends, dtype=torch.int32).view(1, 1, 1, -1),
        rows=rows_there,
        targets=targets_there,
        lengths=tuple(lengths),
        response_ids=tuple(answers),
        ids_after_rows=tuple(ids[row + 1] for row in before_answers),
    )


def as_tensor(numbers: list[int]) -> Tensor:
    """Returns `(len(numbers),)` int64. Converts through `array`: `torch.tensor(list)` is ten times slower."""
    found = array("q", numbers)
    return torch.frombuffer(found, dtype=torch.long) if found else torch.empty(0, dtype=torch.long)


def assert_same_responses(*batches: PackedBatch) -> None:
    """Raises AssertionError unless student, teacher and loss use the same response token ids.

    Compares the input tokens after `rows` of each batch with the targets of the first batch. The comparison runs on
    the host, since comparing tensors would synchronise with the GPU.
    """
    expected = batches[0].response_ids
    for batch in batches:
        if not batch.ids_after_rows == batch.response_ids == expected:
            raise AssertionError("student, teacher and loss do not use the same response token ids.")


def hidden_rows(backbone: Callable[..., Any], batch: PackedBatch) -> Tensor:
    """Returns `(N, hidden)`: the hidden states that predict the response tokens. Does not apply the head."""
    return hidden_rows_and_aux_loss(backbone, batch)[0]


def hidden_rows_and_aux_loss(backbone: Callable[..., Any], batch: PackedBatch) -> tuple[Tensor, AuxLoss | None]:
    """Returns `hidden_rows` and the experts' auxiliary loss over all tokens of the row; None where there is none."""
    out = backbone(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.ends, use_cache=False
    )
    return out.last_hidden_state[0].index_select(0, batch.rows), aux_loss_of(out)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Splits `range(count)` into slices of at most `size`, e.g. the micro-batches of a step."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class ProblemSampler:
    """Samples `count` problems without replacement, in a new order each epoch.

    The order depends only on (seed, epoch), so the only state is `position`: the number of problems sampled so far.
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
        """Returns what the next `draw` will return, without advancing."""
        position, indices = self.position, self.draw(number)
        self.position = position
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
