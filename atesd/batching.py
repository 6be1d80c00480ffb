"""Sequences of different lengths as one row without padding, and the order in which problems are visited.

Separate because it is the only place that knows how a batch is laid out: the student, the teacher and the probe all
call `pack` and `hidden_rows`, and no other file slices a hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "sdpa_packed"


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
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]


def pack(prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device | str) -> PackedBatch:
    """Lay prompts and responses out end to end. Every prompt holds a token at least, since its last predicts the first
    response token."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: there is no position to predict its first response token from.")
    ids, positions, rows, targets = [], [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        first = len(ids) + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        targets.extend(response)
        ids += [*prompt, *response]
        positions.extend(range(len(prompt) + len(response)))
    ends = list(accumulate(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)))
    return PackedBatch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        torch.tensor(ends, dtype=torch.int32).view(1, 1, 1, -1),
        torch.tensor(rows, device=device, dtype=torch.long),
        torch.tensor(targets, device=device, dtype=torch.long),
        tuple(len(r) for r in responses),
    )


def assert_same_responses(*batches: PackedBatch) -> None:
    """Student, teacher and loss see the very same response token ids, or nothing is trained.

    For each batch the tokens that follow `rows` in its input are compared with the targets of the first one.
    """
    targets = batches[0].targets
    for batch in batches:
        seen = batch.input_ids[0, batch.rows + 1]
        if not (torch.equal(seen, targets) and torch.equal(batch.targets, targets)):
            raise AssertionError("student and teacher do not see the same response token ids as the loss.")


def hidden_rows(backbone: Callable[..., Any], batch: PackedBatch) -> Tensor:
    """`(N, hidden)`: the hidden states that predict the response tokens; the head is never applied."""
    out = backbone(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.ends, use_cache=False
    )
    return out.last_hidden_state[0].index_select(0, batch.rows)


def packed_sdpa_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row; plain sdpa for every other mask (generation).

    query `(1, heads, L, head_dim)` -> `(1, L, heads, head_dim)`. One call per sequence costs nothing beside a mask of
    `L * L` entries, and each call is the fused causal kernel.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window, kwargs = kwargs.get("sliding_window"), {**kwargs, "is_causal": True}
    outputs, start = [], 0
    precise = contextlib.nullcontext()
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the CPU kernel is a quarter faster in float32 than in autocast's bfloat16
        query, key, value = query.float(), key.float(), value.float()
        precise = torch.autocast("cpu", enabled=False)
    for end in attention_mask.flatten().tolist():
        if window is not None and end - start > window:
            raise ValueError(
                f"a sequence of {end - start} tokens exceeds the model's sliding window of {window}, which packed "
                "batches do not support with sdpa. Lower max_prompt_length or max_completion_length."
            )
        part = slice(start, end)
        with precise:
            states = (x[:, :, part] for x in (query, key, value))
            outputs.append(sdpa_attention_forward(module, *states, None, **kwargs)[0])
        start = end
    return torch.cat(outputs, dim=1), None


def use_packed_attention(model: torch.nn.Module) -> None:
    """Let `model` (bare, not wrapped) understand `PackedBatch.ends`.

    flash-attention already reads sequence starts from the position ids; any other kernel is refused.
    """
    used = model.config._attn_implementation
    if used in ("sdpa", PACKED_SDPA):
        AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
        AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
        model.set_attn_implementation(PACKED_SDPA)
    else:
        raise ValueError(f"attn_implementation is {used!r}; packed batches need 'sdpa'.")


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

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
