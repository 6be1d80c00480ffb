"""Attention within each sequence of a packed row, for the attention kernels that transformers offers.

batching.py lays rows out; this file runs each kernel on them, and checks that a model's attention does not mix their
sequences. `PackedBatch.ends` arrives here as the attention mask: int32 and 4-D, which transformers forwards unchanged.
Any other mask comes from generation. The original kernel handles it, or `one_token.py`.

| attn_implementation  | packed rows                                                                            |
|----------------------|----------------------------------------------------------------------------------------|
| sdpa, half precision | one call of torch's variable-length kernel, on a GPU from Ampere on; sliding windows   |
| sdpa, otherwise      | one causal call per sequence: of torch's fused kernel, or of `causal.py`               |
| flash_attention_2, 3 | one call of flash-attn's variable-length kernel; needs a GPU and the package           |
| eager                | unfused, for models with attention softcapping (Gemma 2)                               |

"Otherwise" means a CPU, float32, attention dropout, or a head dimension that the variable-length kernel rejects.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from atesd.errors import ModelError
from atesd.models.attention import causal
from atesd.models.attention.one_token import folding_sdpa, half_precision
from atesd.models.batching import hidden_rows, pack, to_device
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap

PACKED_SDPA, PACKED_EAGER = "sdpa_packed", "eager_packed"
FLASH = ("flash_attention_2", "flash_attention_3")


def is_packed(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def lengths_of(ends: Tensor) -> list[int]:
    """Returns the tokens of each sequence of a packed row."""
    return ends.flatten().diff(prepend=ends.new_zeros(1)).tolist()


@dataclass(frozen=True)
class RowLayout:
    """Sequence boundaries of a packed row, in the form that variable-length kernels take.

    Attributes:
        cumulative: `(sequences + 1,)` int32 on the kernel's device: 0, then the end offset of each sequence.
        longest: length of the longest sequence, in tokens.
    """

    cumulative: Tensor
    longest: int


LAYOUTS = WeakTensorKeyDictionary()


def layout_of(ends: Tensor, device: torch.device) -> RowLayout:
    """Returns the layout for `ends`, computed and copied to `device` once per row.

    The cache key is the identity of `ends`: every layer, and every recomputation in backward, passes the same tensor.
    """
    layouts = LAYOUTS.setdefault(ends, {})
    if device not in layouts:
        cumulative = torch.cat([ends.new_zeros(1), ends.flatten()])
        longest = int(cumulative.diff().max())  # no GPU synchronisation: ends is on the CPU
        if cumulative.device != device:
            cumulative = to_device(cumulative, device)
        layouts[device] = RowLayout(cumulative, longest)
    return layouts[device]


def refuse_caps_and_sinks(module: nn.Module, softcap: float | None = None, s_aux: Tensor | None = None) -> None:
    """Raises ValueError for softcapping or attention sinks: some versions of transformers silently drop them."""
    if softcap is not None:
        raise ModelError(
            f"{type(module).__name__} caps its attention scores, which sdpa cannot do: load it as 'eager'."
        )
    if s_aux is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks, which packed batches do not support here.")


@cache
def takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


@cache
def has_varlen_kernel(device: torch.device) -> bool:
    """Whether `device` runs torch's variable-length attention: FlashAttention-2, which needs Ampere or newer."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_serves(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's variable-length kernel supports these inputs and the sdpa `options`."""
    head_dim = query.shape[-1]
    return (
        has_varlen_kernel(query.device)
        and half_precision(query, key, value) is not None
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= 256
        and not options.get("dropout")
        and options.get("position_bias") is None
    )


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Runs torch's variable-length kernel once for the packed row. Shapes as in `packed_sdpa_forward`."""
    layout = layout_of(ends, query.device)
    # autocast does not cover this operator, so cast here
    dtype = half_precision(query, key, value)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (L, heads, head_dim)
    # transformers counts the token itself in the window; the kernel counts only tokens to its left
    left = -1 if sliding_window is None else sliding_window - 1
    # torch 2.11 has no enable_gqa argument: it always supports grouped-query attention
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] and takes(varlen_attn, "enable_gqa") else {}
    out = varlen_attn(
        q,
        k,
        v,
        layout.cumulative,
        layout.cumulative,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(left, 0),
        **grouped,
    )
    return out.unsqueeze(0)


def packed_sdpa_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row. For every other mask (generation) it is sdpa.

    Maps query `(1, heads, L, head_dim)` to `(1, L, heads, head_dim)`. Calls torch's variable-length kernel once if it
    supports the inputs. Otherwise calls a causal kernel per sequence: a mask would have `L * L` entries.
    """
    refuse_caps_and_sinks(module, kwargs.get("softcap"), kwargs.get("s_aux"))
    if not is_packed(attention_mask):
        return folding_sdpa(module, query, key, value, attention_mask, **kwargs)
    window, kwargs = kwargs.get("sliding_window"), {**kwargs, "is_causal": True}
    if varlen_serves(query, key, value, kwargs):
        return varlen_forward(query, key, value, attention_mask, kwargs.get("scaling"), window), None
    lengths = lengths_of(attention_mask)
    if window is not None and max(lengths) > window:
        raise ModelError(
            f"a sequence of {max(lengths)} tokens exceeds the model's sliding window of {window}, which packed "
            "batches support with sdpa only in half precision on a GPU. Use a GPU with bf16 set to true, or lower "
            "max_prompt_length or max_completion_length."
        )
    outputs = []
    precise = contextlib.nullcontext()
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the CPU kernel is faster in float32 than in bfloat16
        query, key, value = query.float(), key.float(), value.float()
        precise = torch.autocast("cpu", enabled=False)
    # split, not slices: backward of each slice would fill and add a tensor of the row's size
    for states in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        with precise:
            if causal.serves(states[0], kwargs):
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                outputs.append(causal.causal_attention(*states, scaling).transpose(1, 2))
            else:
                outputs.append(sdpa_attention_forward(module, *states, None, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def packed_flash_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Runs flash-attn's variable-length kernel once for the packed row; plain flash-attn for every other mask."""
    if not is_packed(attention_mask):
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    refuse_caps_and_sinks(module, s_aux=kwargs.get("s_aux"))
    if kwargs.get("dropout") and module.config._attn_implementation != "flash_attention_2":
        raise ModelError(
            f"{type(module).__name__} drops attention weights out in training, which flash-attn 2 supports and later "
            "versions do not: set attn_implementation to 'flash_attention_2' or 'sdpa'."
        )
    layout = layout_of(attention_mask, query.device)
    kwargs |= {"cu_seq_lens_q": layout.cumulative, "cu_seq_lens_k": layout.cumulative, "is_causal": True}
    kwargs |= {"max_length_q": layout.longest, "max_length_k": layout.longest}
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
    """Unfused `softmax(cap(q k^T scaling) + mask) v`, one sequence at a time. Shapes as in `packed_sdpa_forward`.

    Materialises T * T scores per head for a sequence of T tokens. Use it only for models without a fused kernel.
    """
    refuse_caps_and_sinks(module, s_aux=kwargs.get("s_aux"))
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
    outputs = []
    lengths = lengths_of(attention_mask)
    for states in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        position = torch.arange(states[0].shape[2], device=query.device)
        back = position[:, None] - position
        seen = (back >= 0) if sliding_window is None else (back >= 0) & (back < sliding_window)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_(~seen, torch.finfo(query.dtype).min)
        outputs.append(attend(*states, mask))
    return torch.cat(outputs, dim=1), None


def use_packed_attention(model: nn.Module) -> None:
    """Switches `model` (not wrapped) to an attention function that takes `PackedBatch.ends` as its mask.

    Raises:
        ValueError: the model's attention implementation has no packed version; the message names it.
    """
    used = model.config._attn_implementation
    if used in FLASH:  # keep the name: transformers selects the kernel and mask, and checks the dtype, by it
        AttentionInterface.register(used, packed_flash_forward)
    elif used in ("sdpa", PACKED_SDPA):
        AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
        AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
        model.set_attn_implementation(PACKED_SDPA)
    elif used in ("eager", PACKED_EAGER):
        AttentionInterface.register(PACKED_EAGER, packed_eager_forward)
        AttentionMaskInterface.register(PACKED_EAGER, eager_mask)
        model.set_attn_implementation(PACKED_EAGER)
    else:
        raise ModelError(
            f"attn_implementation of {type(model).__name__} is {used!r}; packed batches need 'sdpa', "
            "'flash_attention_2', 'flash_attention_3' or 'eager'."
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Checks that the model does not mix packed sequences: compares two short sequences packed and one by one.

    Two kinds of model fail: those whose attention does not read its mask through transformers' interface, and those
    with layers that carry state from token to token.

    Raises:
        ValueError: the hidden states differ by more than 1 % of their norm. The message names the model.
    """
    base = unwrap(model)
    backbone, head = hidden_states_and_head(model)
    device, training = head.weight.device, base.training
    # flash-attn does not support float32
    half = torch.autocast(device.type, torch.bfloat16, enabled=base.config._attn_implementation in FLASH)
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7, 2, 8]]
    base.eval()
    try:
        with half:
            together = hidden_rows(backbone, pack(prompts, responses, device))
            alone = [hidden_rows(backbone, pack([p], [r], device)) for p, r in zip(prompts, responses, strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(base).__name__} cannot run a packed row, so it cannot be trained here: {error}"
        ) from error
    finally:
        base.train(training)
    expected = torch.cat(alone).float()
    error = float((together.float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ModelError(
            f"{type(base).__name__} mixes the sequences of a packed row (relative difference {error:.2g}): its "
            "attention or its layers' state does not stop at a sequence's end, so it cannot be trained here."
        )
