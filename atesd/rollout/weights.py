"""The student's weights in the form that engines load: one tensor per checkpoint name, with adapters merged.

One engine takes them as a stream, another from files. In memory, transformers fuses the experts of a layer into one
tensor; engines know the names of checkpoints only, and may skip another name without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from atesd.errors import ModelError
from atesd.models.merging import adapted_modules, check_mergeable, merged_module
from atesd.parallel.sharding import gather_as, is_sharded, on_main
from atesd_kernels.integrations.head import unwrap

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")  # "model.layers.3" of "model.layers.3.mlp.experts.gate_up_proj"


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor)` pairs in `dtype`, named and shaped as in the model's checkpoint, as peft merges them.

    Merges one layer at a time and does not change the model's weights. Yields tied tensors once. Buffers that a
    checkpoint holds keep their dtype. If weights are sharded, all processes must iterate together; the main one gets
    full tensors, the others None, under the names in memory.

    Call `check_merged` once before: a merge that peft gets wrong is not noticed here.
    """
    base = unwrap(model)
    # transformers' conversion needs all parts of a layer at once: one checkpoint tensor may come from several
    for _, pairs in groupby(merged_in_memory(base, dtype), key=lambda pair: _layer_of(pair[0])):
        named = dict(pairs)
        gathered = all(tensor is not None for tensor in named.values())
        yield from (revert_weight_conversion(base, named) if gathered else named).items()


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else ""


def merged_in_memory(base: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields what `merged_weights` does under the names that `base`, without its peft wrapper, has in memory."""
    adapted = adapted_modules(base)
    owners = {f"{name}.{part}": name for name, module in adapted.items() for part, _ in module.named_parameters()}
    sharded, done = is_sharded(base), set()
    for name, weight in base.named_parameters():
        owner = owners.get(name)
        if owner is None:
            yield name, gather_as(dtype, weight)
        elif owner not in done:
            done.add(owner)
            merged = merged_module(adapted[owner])
            own = {**{part: p.detach().to(dtype) for part, p in merged.named_parameters()}, **stored_buffers(merged)}
            yield from ((f"{owner}.{part}", on_main(tensor) if sharded else tensor) for part, tensor in own.items())
    inside = tuple(f"{name}." for name in adapted)
    for name, buffer in stored_buffers(base).items():
        if not name.startswith(inside):
            yield name, on_main(buffer) if sharded else buffer


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that a checkpoint holds by name: those of a router that corrects its choice, for example."""
    return {
        f"{owner}.{name}" if owner else name: buffer.detach()
        for owner, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


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
