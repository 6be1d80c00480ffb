"""The student's weights as an engine loads them: one tensor per checkpoint name, adapters merged.

Separate from the engines because what is streamed into one and written down for another is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atesd.parallel.sharding import gather_tensors, gathered_params, on_main
from atesd_kernels.integrations.head import unwrap


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` under the names of the model's checkpoint, in `dtype`; `W + scale * B A` where LoRA is on.

    One matrix is merged at a time, and the model's own weights are not touched: adding and subtracting an update
    would not give a bfloat16 base back. Tied tensors come once. All processes go through sharded
    ones together; they come whole to the main one, and as None to the others.

    Raises:
        ValueError: an adapter that is more than `W + scale * B A` (DoRA), or one on an embedding.
    """
    base = unwrap(model)
    updates = {}
    for name, module in base.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        if not isinstance(module.base_layer, nn.Linear) or any(getattr(module, "use_dora", {}).values()):
            raise ValueError(
                f"the adapter on {name!r} is not plain LoRA on a linear layer, so its weights cannot be merged for "
                "another engine: set lora_target_modules to linear layers, or rollout_engine to 'hf'."
            )
        updates[f"{name}.base_layer.weight"] = module
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        module, borrowed = updates.get(name), hasattr(weight, "ds_id")
        with gathered_params([weight] if module is None else list(module.parameters())):
            weight = weight.detach()
            for adapter in () if module is None else module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
            yield (
                name.replace(".base_layer.", "."),
                gather_tensors(weight.to(dtype)) if not borrowed else on_main(weight.to(dtype)),
            )
