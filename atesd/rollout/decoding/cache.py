"""The cache of keys and values while responses are decoded, and how a CPU fills it with the prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from atesd.models.attention.packed import PACKED_SDPA
from atesd.models.batching import pack

ROOM = 1024  # tokens a cache grows by: an evaluation may allow 38,912, but few responses need them


class BufferedLayer(DynamicLayer):
    """A growing cache layer in `dtype` that writes to a buffer; it does not concatenate at every token."""

    def __init__(self, dtype: torch.dtype, room: int):
        super().__init__()
        self.wanted, self.room = dtype, room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values `(batch, heads, new, head_dim)`. Returns all of them, `(batch, heads, length,
        head_dim)` each."""
        start, new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self.allocate(states, new + self.room) for states in (key_states, value_states)]
        elif start + new > self.buffers[0].shape[-2] or self.keys.shape[0] != self.buffers[0].shape[0]:
            old = (self.keys, self.values)
            self.buffers = [self.allocate(states, start + new + self.room) for states in old]
            for buffer, states in zip(self.buffers, old, strict=True):
                buffer[:, :, :start] = states
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : start + new] = states
        self.keys, self.values = (buffer[:, :, : start + new] for buffer in self.buffers)
        return self.keys, self.values

    def pad_left(self, lengths: list[int]) -> None:
        """Turns the keys and values of one packed row, `(1, heads, L, head_dim)` each, into those of its sequences."""
        if not self.is_initialized:  # a layer that the model does not run
            return
        width, packed = max(lengths), (self.keys, self.values)
        self.buffers = [self.allocate(row.expand(len(lengths), -1, -1, -1), width + self.room) for row in packed]
        for buffer, row in zip(self.buffers, packed, strict=True):
            for sequence, states in zip(buffer, row[0].split(lengths, dim=1), strict=True):
                start = width - states.shape[1]
                sequence[:, :start] = 0  # masked, so any finite number
                sequence[:, start:width] = states
        self.keys, self.values = (buffer[:, :, :width] for buffer in self.buffers)

    def allocate(self, states: Tensor, room: int) -> Tensor:
        return states.new_empty((*states.shape[:2], room, states.shape[-1]), dtype=self.wanted)


def buffered_cache(config: Any, dtype: torch.dtype, new_tokens: int) -> DynamicCache:
    """Returns transformers' cache for `config`, with its plain growing layers replaced by buffered ones with room for
    `new_tokens`, at first for `ROOM` of them at most."""
    cache, room = DynamicCache(config=config), min(new_tokens, ROOM)
    cache.layers = [BufferedLayer(dtype, room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_packed_prompts(model: nn.Module, cache: Any) -> bool:
    """Whether `read_prompts` serves: the model trains on packed rows, and its layers keep every token."""
    layers = {type(layer) for layer in cache.layers}
    return model.config._attn_implementation == PACKED_SDPA and layers == {BufferedLayer}


def read_prompts(
    model: nn.Module, input_ids: Tensor, padding: list[int], cache_name: str, cache: DynamicCache, **options: Any
) -> Tensor:
    """Reads left-padded prompts `(batch, width)` as one row without padding, as in training, into `cache`.

    Returns the logits of each prompt's last position, `(batch, vocab)`.
    """
    prompts = [row[n:] for row, n in zip(input_ids.tolist(), padding, strict=True)]
    row = pack(prompts, [[] for _ in prompts], input_ids.device)
    logits = model(
        input_ids=row.input_ids,
        attention_mask=row.ends,
        position_ids=row.position_ids,
        use_cache=True,
        logits_to_keep=row.last_positions,
        **{cache_name: cache},
        **options,
    ).logits[0]
    for layer in cache.layers:
        layer.pad_left([len(prompt) for prompt in prompts])
    return logits


def additive_mask(mask: Tensor, cache: DynamicCache) -> Tensor:
    """Converts `mask` `(batch, length)` once per token; otherwise every layer would.

    Returns `(batch, 1, 1, length)`: 0 where the new token sees a key, and -inf elsewhere.
    """
    dtype = cache.layers[0].wanted
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(mask == 0, -torch.inf)[:, None, None]
