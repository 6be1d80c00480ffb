"""Attention of one new token in half precision on a CPU, while a response is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HALF = (torch.bfloat16, torch.float16)


def half_precision(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype | None:
    """Returns the dtype that sdpa would use (autocast's, or that of the inputs) if it is bf16 or fp16, else None."""
    dtypes, device = {query.dtype, key.dtype, value.dtype}, query.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype(device)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALF) else None


def folds(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether `one_token_forward` computes what sdpa computes with these `options`."""
    return (
        query.device.type == "cpu"
        and query.shape[2] == 1
        and half_precision(query, key, value) is not None
        and (mask is None or mask.shape[1] == 1)
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )


def one_token_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Runs sdpa for one new token, with all heads of a group as rows of one query. Shapes as in `packed_sdpa_forward`.

    In half precision the CPU kernel takes longer for a query of one row than for one of two or three, by
    `bench/attention_speed.py`. transformers folds the heads itself, but only if there is a mask.
    """
    batch, heads, _, head_dim = query.shape
    group = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], group, head_dim)
    if group == 1:
        rows = rows.expand(-1, -1, 2, -1)
    out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, :group].reshape(batch, 1, heads, -1)


def folding_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, with `one_token_forward` where that serves."""
    if folds(query, key, value, attention_mask, options):
        return one_token_forward(query, key, value, attention_mask, options.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def folded_heads() -> contextlib.AbstractContextManager[None]:
    """Context in which "sdpa" is `folding_sdpa`. A model keeps that name, which some read to choose their mask."""
    of_user = "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping
    return contextlib.nullcontext() if of_user else replaced(ALL_ATTENTION_FUNCTIONS, "sdpa", folding_sdpa)


@contextlib.contextmanager
def replaced(functions: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Context in which transformers finds `function` by `name` in `functions`, its attention or its mask functions."""
    local = functions._local_mapping.get(name)
    functions[name] = function
    try:
        yield
    finally:
        if local is None:
            del functions[name]
        else:
            functions[name] = local
