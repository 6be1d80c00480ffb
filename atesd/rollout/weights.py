"""The student's weights in the form that engines load: one tensor per checkpoint name, with adapters merged.

One engine takes them as a stream, another from files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atesd.errors import ModelError
from atesd.parallel.sharding import gather_tensors, gathered_params, on_main
from atesd_kernels.integrations.head import unwrap


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor)` pairs in `dtype`, under the names of the model's checkpoint; `W + scale * B A` with LoRA.

    Merges one matrix at a time and does not change the model's weights, because adding and subtracting an update does
    not restore a bfloat16 base. Yields tied tensors once. If weights are sharded, all processes must iterate together;
    the main one gets full tensors, the others None.

    Raises:
        ValueError: for an adapter that is not `W + scale * B A` (DoRA), or is on an embedding.
    """
    base = unwrap(model)
    updates = {}
    for name, module in base.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        if not isinstance(module.base_layer, nn.Linear) or any(getattr(module, "use_dora", {}).values()):
            raise ModelError(
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
