"""Attention within each sequence of a packed row, for the attention kernels transformers offers.

Separate from batching.py, which lays rows out: this file is what a packed row means to an attention kernel, and the
check that a model's attention really keeps its sequences apart. `PackedBatch.ends` arrives here as the attention mask:
int32 and four-dimensional, which transformers hands on untouched. Any other mask is generation, left to the kernel.

| attn_implementation  | packed rows                                                                            |
|----------------------|----------------------------------------------------------------------------------------|
| sdpa, half precision | one call of torch's variable-length kernel, on a GPU from Ampere on; sliding windows   |
| sdpa, otherwise      | one causal call of torch's fused kernel for each sequence                              |
| flash_attention_2, 3 | one call of flash-attn's variable-length kernel; needs a GPU and the package           |
| eager                | written out, for models that cap their attention scores (Gemma 2)                      |

"Otherwise" is a CPU, float32, attention dropout, or a head dimension that torch's variable-length kernel does not take.
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

from atesd.models.batching import hidden_rows, pack, to_device
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap

PACKED_SDPA, PACKED_EAGER = "sdpa_packed", "eager_packed"
FLASH = ("flash_attention_2", "flash_attention_3")
HALF = (torch.bfloat16, torch.float16)


def is_packed(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row lie, as variable-length kernels ask for it.

    Attributes:
        cumulative: `(sequences + 1,)` int32 on the kernel's device: 0, then where each sequence ends.
        longest: tokens of the longest sequence.
    """

    cumulative: Tensor
    longest: int


LAYOUTS = WeakTensorKeyDictionary()


def layout_of(ends: Tensor, device: torch.device) -> Layout:
    """The layout of the row that ends belongs to, computed and copied to `device` once a row.

    Every layer, and every recomputation in backward, passes the same mask tensor: its identity is the key.
    """
    layouts = LAYOUTS.setdefault(ends, {})
    if device not in layouts:
        cumulative = torch.cat([ends.new_zeros(1), ends.flatten()])
        longest = int(cumulative.diff().max())  # known without waiting for the GPU, as ends is on the CPU
        if cumulative.device != device:
            cumulative = to_device(cumulative, device)
        layouts[device] = Layout(cumulative, longest)
    return layouts[device]


def refuse_caps_and_sinks(module: nn.Module, softcap: float | None = None, s_aux: Tensor | None = None) -> None:
    """Some versions of transformers drop the two without a word where a kernel lacks them."""
    if softcap is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention scores, which sdpa cannot do: load it as 'eager'."
        )
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which packed batches do not support here.")


@cache
def takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


@cache
def has_varlen_kernel(device: torch.device) -> bool:
    """Whether torch's variable-length attention runs on `device`: it is FlashAttention-2, which needs Ampere."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def half_precision(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype | None:
    """The half precision sdpa would attend in here: autocast's, or the states' own. None if that is another dtype."""
    dtypes, device = {query.dtype, key.dtype, value.dtype}, query.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype(device)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALF) else None


def varlen_serves(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's variable-length kernel computes what `options` ask of sdpa for these states."""
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
    """One call of torch's variable-length kernel for the whole row; shapes as in `packed_sdpa_forward`."""
    layout = layout_of(ends, query.device)
    # autocast does not know this operator: it casts nothing for it
    dtype = half_precision(query, key, value)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (L, heads, head_dim)
    # transformers counts the token itself among the window's, the kernel only those to its left
    left = -1 if sliding_window is None else sliding_window - 1
    # torch 2.11 shares key heads unasked
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
    """Causal attention within each sequence of a packed row; plain sdpa for every other mask (generation).

    query `(1, heads, L, head_dim)` -> `(1, L, heads, head_dim)`. One call for the row where torch's variable-length
    kernel serves. Elsewhere one call of the fused causal kernel for each sequence: a mask would have `L * L` entries.
    """
    refuse_caps_and_sinks(module, kwargs.get("softcap"), kwargs.get("s_aux"))
    if not is_packed(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window, kwargs = kwargs.get("sliding_window"), {**kwargs, "is_causal": True}
    if varlen_serves(query, key, value, kwargs):
        return varlen_forward(query, key, value, attention_mask, kwargs.get("scaling"), window), None
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
                "batches do not support with sdpa, but in half precision on a GPU. Set bf16 to true there, or lower "
                "max_prompt_length or max_completion_length."
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
    refuse_caps_and_sinks(module, s_aux=kwargs.get("s_aux"))
    if kwargs.get("dropout") and module.config._attn_implementation != "flash_attention_2":
        raise ValueError(
            f"{type(module).__name__} drops attention weights out in training, which flash-attn 2 does and later "
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
    """`softmax(cap(q k^T scaling) + mask) v`, written out, one sequence at a time; shapes as in `packed_sdpa_forward`.

    A sequence of T tokens needs T * T scores a head: this is for models no fused kernel serves.
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
    if used in FLASH:  # under its own name: transformers picks the kernel and the mask, and checks the dtype, by it
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
        raise ValueError(
            f"attn_implementation of {type(model).__name__} is {used!r}; packed batches need 'sdpa', "
            "'flash_attention_2', 'flash_attention_3' or 'eager'."
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
    # flash-attn has no float32 form
    half = torch.autocast(device.type, torch.bfloat16, enabled=base.config._attn_implementation in FLASH)
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7, 2, 8]]
    base.eval()
    try:
        with half:
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
