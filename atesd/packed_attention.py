"""Attention within each sequence of a packed row, for the attention kernels transformers offers.

Separate from batching.py, which lays rows out: this file is what a packed row means to an attention kernel, and the
check that a model's attention really keeps its sequences apart. `PackedBatch.ends` arrives here as the attention mask:
int32 and four-dimensional, which transformers hands on untouched. Any other mask is generation, left to the kernel.

| attn_implementation | packed rows                                                              |
|---------------------|--------------------------------------------------------------------------|
| sdpa                | one causal call of torch's fused kernel for each sequence                |
| flash_attention_2   | one variable-length call; needs a GPU and flash-attn                     |
| eager               | written out, for models that cap their attention logits (Gemma 2)        |
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from atesd.batching import hidden_rows, pack
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap

PACKED_SDPA, PACKED_EAGER, FLASH = "sdpa_packed", "eager_packed", "flash_attention_2"


def is_packed(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def packed_sdpa_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row; plain sdpa for every other mask (generation).

    query `(1, heads, L, head_dim)` -> `(1, L, heads, head_dim)`. One call per sequence costs nothing beside a mask of
    `L * L` entries, and each call is the fused causal kernel.
    """
    if not is_packed(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window, kwargs = kwargs.get("sliding_window"), {**kwargs, "is_causal": True}
    outputs, start = [], 0
    precise = contextlib.nullcontext()
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the CPU kernel is faster in float32 than in autocast's bfloat16
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


def packed_flash_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """flash-attention's variable-length kernel over the whole row; its own way for every other mask."""
    if not is_packed(attention_mask):
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    ends = attention_mask.flatten()  # on the CPU: the longest sequence is known without waiting for the GPU
    starts_and_end = torch.cat([ends.new_zeros(1), ends])
    longest = int(starts_and_end.diff().max())
    cumulative = starts_and_end.to(query.device)
    kwargs |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "is_causal": True}
    kwargs |= {"max_length_q": longest, "max_length_k": longest}
    return flash_attention_forward(module, query, key, value, None, **kwargs)


def packed_eager_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`softmax(cap(q k^T scaling) + mask) v`, written out, one sequence at a time; shapes as in `packed_sdpa_forward`.

    A sequence of T tokens needs T * T scores a head: this is for models no fused kernel serves.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which packed batches do not support here.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if mask is None else scores + mask[..., : k.shape[-2]]
        weights = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32), dropout, module.training)
        return (weights.to(v.dtype) @ v).transpose(1, 2)

    if not is_packed(attention_mask):
        return attend(query, key, value, attention_mask).contiguous(), None
    outputs, start = [], 0
    for end in attention_mask.flatten().tolist():
        part = slice(start, end)
        position = torch.arange(end - start, device=query.device)
        back = position[:, None] - position
        seen = (back >= 0) if sliding_window is None else (back >= 0) & (back < sliding_window)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_(~seen, torch.finfo(query.dtype).min)
        outputs.append(attend(query[:, :, part], key[:, :, part], value[:, :, part], mask))
        start = end
    return torch.cat(outputs, dim=1), None


def use_packed_attention(model: nn.Module) -> None:
    """Let `model` (bare, not wrapped) understand `PackedBatch.ends`.

    Raises:
        ValueError: for a kernel with no packed form, naming it.
    """
    used = model.config._attn_implementation
    if used == FLASH:  # under its own name: transformers picks the mask and checks the dtype by it
        AttentionInterface.register(FLASH, packed_flash_forward)
    elif used in ("sdpa", PACKED_SDPA):
        AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
        AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
        model.set_attn_implementation(PACKED_SDPA)
    elif used in ("eager", PACKED_EAGER):
        AttentionInterface.register(PACKED_EAGER, packed_eager_forward)
        AttentionMaskInterface.register(PACKED_EAGER, eager_mask)
        model.set_attn_implementation(PACKED_EAGER)
    else:
        raise ValueError(
            f"attn_implementation of {type(model).__name__} is {used!r}; packed batches need 'sdpa', "
            "'flash_attention_2' or 'eager'."
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Run two short sequences in one row and each alone, and compare: models that mix them are refused by name.

    That is what happens to an attention that does not read its mask through transformers' interface, and to layers
    that carry a state from token to token.

    Raises:
        ValueError: when the hidden states differ by more than 1 % of their norm.
    """
    base = unwrap(model)
    backbone, head = hidden_states_and_head(model)
    device, training = head.weight.device, base.training
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7, 2, 8]]
    base.eval()
    try:
        together = hidden_rows(backbone, pack(prompts, responses, device))
        alone = [hidden_rows(backbone, pack([p], [r], device)) for p, r in zip(prompts, responses, strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(base).__name__} cannot run a packed row, so it cannot be trained here: {error}"
        ) from error
    finally:
        base.train(training)
    expected = torch.cat(alone).float()
    error = float((together.float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ValueError(
            f"{type(base).__name__} mixes the sequences of a packed row (relative difference {error:.2g}): its "
            "attention or its layers' state does not stop at a sequence's end, so it cannot be trained here."
        )
