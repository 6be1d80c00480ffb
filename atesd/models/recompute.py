"""Activations that backward computes again rather than keeps. Separate from models.py because it is about memory alone.

`full` keeps each layer's input, so backward runs every layer twice. `selective` also keeps what the matrix products and
attention return: what is computed again (norms, activations, rotations, casts) is most of the memory and little of the
time. The modes are torchtitan's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# By name, as not every build of torch has all of them: products, with the place of the left factor, and attention,
# torch.nn.attention.varlen's included.
LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention torch_attn::_varlen_attn"
).split()
# A product whose sums are this many times shorter than its rows, such as a LoRA update's second, costs little to repeat
# for what it would take to keep (our choice).
LOW_RANK = 8


def is_kept(operator: Any, *arguments: Any) -> bool:
    """Whether `selective` keeps what `operator` returns for `arguments`."""
    name = operator.name().removeprefix("aten::")
    if name not in LEFT:
        return name in ATTENTION
    left, right = arguments[LEFT[name] : LEFT[name] + 2]
    return left.shape[-1] * LOW_RANK >= right.shape[-1]


def selective_policy(_context: Any, operator: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    kept = is_kept(operator, *arguments)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_activations(model: Any, mode: str) -> None:
    """Switch gradient checkpointing of a transformers model on; `mode` is `full` or `selective`."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, selective_policy)
    # renamed in transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings)
