"""The student's weights in the form that engines load: one tensor per checkpoint name, with adapters merged.

One engine takes them as a stream, another from files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atesd.errors import ModelError
from atesd.models.merging import adapted_modules, check_mergeable, merged_module
from atesd.parallel.sharding import gather_as, is_sharded, on_main
from atesd_kernels.integrations.head import unwrap


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor)` pairs in `dtype`, under the names of the model's checkpoint, as peft merges them.

    Merges one layer at a time and does not change the model's weights. Yields tied tensors once. If weights are
    sharded, all processes must iterate together; the main one gets full tensors, the others None.

    Call `check_merged` once before: a merge that peft gets wrong is not noticed here.
    """
    base = unwrap(model)
    adapted = adapted_modules(base)
    owners = {f"{name}.{part}": name for name, module in adapted.items() for part, _ in module.named_parameters()}
    sharded, done = is_sharded(model), set()
    for name, weight in base.named_parameters():
        owner = owners.get(name)
        if owner is None:
            yield name, gather_as(dtype, weight)
        elif owner not in done:
            done.add(owner)
            for part, tensor in merged_module(adapted[owner]).named_parameters():
                merged = tensor.detach().to(dtype)
                yield f"{owner}.{part}", on_main(merged) if sharded else merged


def check_merged(model: nn.Module) -> None:
    """Checks once, at an engine's start, that `merged_weights` will give the model that is trained. All processes call
    it together.

    Raises:
        ModelError: an adapter that cannot be merged.
    """
    check_mergeable(model, "Set rollout_engine to 'hf', which runs the adapter as it is.")


def check_plain_lora(model: nn.Module) -> None:
    """Checks that vLLM, which reads adapters itself, makes of this one what peft does: `W + scale * B A`.

    vLLM ignores settings of an adapter that it does not know.

    Raises:
        ModelError: any other adapter.
    """
    for name, module in adapted_modules(unwrap(model)).items():
        if problem := not_plain(module):
            raise ModelError(
                f"the adapter on {name!r} is {problem}, and a vLLM server loads plain LoRA on linear layers only: set "
                "vllm_server_weights to 'merged', or rollout_engine to 'hf'."
            )


def not_plain(module: Any) -> str | None:
    """Returns what an adapted module is, if not plain LoRA on a linear layer."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if not kind.startswith("peft.tuners.lora.") or not isinstance(module.base_layer, nn.Linear):
        return f"a {kind}"
    variants = [type(variant).__name__ for variant in module.lora_variant.values()]
    return next(iter(variants), "LoRA with a bias" if any(module.lora_bias.values()) else None)
