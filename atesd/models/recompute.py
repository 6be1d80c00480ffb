"""Gradient checkpointing: backward recomputes activations instead of storing them.

`full` stores only the input of each layer, so each layer's forward runs twice. `selective` also stores the outputs of
matmuls and attention. It recomputes norms, activations, rotations and casts: most of the memory and little of the time.
The modes are torchtitan's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Operators by name, since not every build of torch has all of them. LEFT maps each matmul to the index of its left
# operand. ATTENTION includes the operator of torch.nn.attention.varlen and our own.
LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention torch_attn::_varlen_attn "
    "atesd::causal_attention"
).split()
# Recompute a matmul whose inner dimension is over LOW_RANK times smaller than its output width, e.g. LoRA's second:
# it costs little time, and its output takes much memory (our choice).
LOW_RANK = 8


def is_kept(operator: Any, *arguments: Any) -> bool:
    """Whether `selective` stores the output of `operator` for `arguments`."""
    name = operator.name().removeprefix("aten::")
    if name not in LEFT:
        return name in ATTENTION
    left, right = arguments[LEFT[name] : LEFT[name] + 2]
    return left.shape[-1] * LOW_RANK >= right.shape[-1]


def selective_policy(_context: Any, operator: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    kept = is_kept(operator, *arguments)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_activations(model: Any, mode: str) -> None:
    """Enables gradient checkpointing of a transformers model. `mode` is `full` or `selective`."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, selective_policy)
    # renamed in transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings)
