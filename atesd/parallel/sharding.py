"""Sharded weights: FSDP2 (`fully_shard`) as an accelerate config asks for it, and when weights are gathered.

FSDP2 sums gradients instead of averaging them: the loss is divided by the tokens of all processes already. ZeRO-3's
parameters are recognised by their `ds_id`; DeepSpeed's engine is in `zero.py`.

| what                              | gathered                                                         |
|-----------------------------------|------------------------------------------------------------------|
| the weights of a layer            | during its forward and backward                                  |
| the head, as the loss reads it    | always; a trained one is gathered once a step (`sharded_head`)   |
| all weights                       | while the Hugging Face engine decodes (`unsharded`)              |
| trained weights, optimizer states | for a checkpoint, one after another, on the main process's CPU   |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from atesd.errors import AtesdError
from atesd_kernels.integrations.head import unwrap

# Whether a model reshards its layers between forward and backward (ZeRO-3), or only after backward (ZeRO-2)
RESHARDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
IN_USE_MARKER = -1  # a module number no module has: it marks a ZeRO-3 parameter as in use


class ShardingError(AtesdError, ValueError):
    """An accelerate config with a setting that is not supported here. The message names the setting and the remedy."""


def env_flag(variable: str) -> bool:
    """Whether `accelerate launch` has set this environment variable to true."""
    return os.environ.get(variable, "false").lower() == "true"


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The FSDP2 settings of an accelerate config; None where it has none.

    Raises:
        ShardingError: FSDP settings that do not work here.
    """
    if not env_flag("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return None
    # accelerate itself leaves FSDP out on a CPU
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    for wrong, what in (
        (plugin.fsdp_version != 2, "fsdp_version must be 2"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading must be false: all load the model"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params must be false"),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing must be false: the recipe's "
         "gradient_checkpointing does it"),
    ):  # fmt: skip
        if wrong:
            raise ShardingError(f"the accelerate config does not work here: {what}.")
    return plugin


def shard(
    model: nn.Module, plugin: FullyShardedDataParallelPlugin, device: torch.device, has_backward: bool = True
) -> None:
    """Shard `model` (bare or under peft) in place over all processes: each layer, an untied head, and the rest.

    Without a backward, after which `fsdp_reshard_after_forward: false` reshards, layers are resharded after forward.
    """
    base = unwrap(model)
    named = set(plugin.transformer_cls_names_to_wrap or ())
    kinds = {type(module).__name__ for module in base.modules()}
    names = named & kinds or set(base._no_split_modules)  # a teacher may have other layers than the student
    parts = [module for module in base.modules() if type(module).__name__ in names]
    head = base.get_output_embeddings()
    if head.weight is not base.get_input_embeddings().weight:
        parts.append(head)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    RESHARDS[base] = bool(plugin.reshard_after_forward) or not has_backward
    for module in (*parts, base):
        fully_shard(module, mesh=mesh, reshard_after_forward=RESHARDS[base])
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def zero3_parameters(model: nn.Module) -> list[Any]:
    """The parameters that ZeRO-3 shards: each process holds a piece of the flattened parameter, `ds_tensor`."""
    return [p for p in model.parameters() if hasattr(p, "ds_id")]


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds all weights. A forward is then a collective."""
    return bool(sharded_modules(model) or zero3_parameters(model))


def local_shard(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: FSDP2's DTensor, ZeRO-3's piece, or the full tensor."""
    return getattr(parameter, "ds_tensor", parameter).detach()


@contextlib.contextmanager
def gathered_params(parameters: list[Any]) -> Iterator[None]:
    """Gather ZeRO-3's parameters on every process within the block, for reading only. Others are left as they are."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        for p in parameters:
            p.ds_active_sub_modules.add(IN_USE_MARKER)  # otherwise the first forward would release them
        try:
            yield
        finally:
            for p in parameters:
                p.ds_active_sub_modules.discard(IN_USE_MARKER)


def drop_zero_hooks(module: nn.Module) -> None:
    """Removes from a copied `module`, in place, what ZeRO-3 put into the original to gather its parameters.

    The copy's parameters are not ZeRO's, and its hooks would count its forwards as the original's.
    """
    for part in module.modules():
        part._parameters = dict(part._parameters.items())  # ZeRO-3's own dict gathers what is read from it
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("deepspeed.")]:
                del hooks[key]


def reshard(model: nn.Module) -> None:
    """Reshard what a forward without gradient has left gathered. A no-op without FSDP2."""
    for module in sharded_modules(model):
        module.reshard()


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights on every process within the block: forwards are local, and ranks may run different numbers."""
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with gathered_params(zero3_parameters(model)):
            yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(RESHARDS[unwrap(model)], recurse=False)
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """What an FSDP2 tensor's shards add up to, on every process; other tensors as they are."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def on_main(value: Tensor) -> Tensor | None:
    return value.cpu() if torch.distributed.get_rank() == 0 else None


def gather_tensors(value: Any) -> Any:
    """Gather every sharded tensor in `value`: a tensor, or dicts, lists and tuples of tensors.

    They are gathered one after another onto the main process's CPU; on the other processes they become None.
    """
    if hasattr(value, "ds_id"):
        with gathered_params([value]):
            return on_main(value.detach())
    if isinstance(value, DTensor):
        return on_main(value.detach().full_tensor())
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, dict):
        return {key: gather_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather_tensors(item) for item in value)
    return value


def gather_as(dtype: torch.dtype, parameter: Tensor) -> Tensor | None:
    """`gather_tensors` of a parameter in `dtype`. FSDP2's is cast before it is sent."""
    with gathered_params([parameter]):
        cast = parameter.detach().to(dtype)
        return on_main(cast) if hasattr(parameter, "ds_id") else gather_tensors(cast)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard `value`, the same full tensor on every process, as `like` is sharded. A no-op where `like` is not."""
    if hasattr(like, "ds_id"):
        size, rank = like.ds_tensor.numel(), torch.distributed.get_rank()
        piece = value.flatten()[rank * size : (rank + 1) * size].to(like.ds_tensor)
        return nn.functional.pad(piece, (0, size - len(piece)))
    if not isinstance(like, DTensor):
        return value
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard a saved optimizer state of full tensors as the optimizer's parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        index: {
            name: shard_like(v, parameters[index]) if torch.is_tensor(v) and v.shape == parameters[index].shape else v
            for name, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": cut}


def writer(model: nn.Module, trained: dict[str, Tensor]) -> Callable[..., None]:
    """`model.save_pretrained` for the main process to call alone. Every process makes one, since it gathers weights.

    Args:
        trained: the trained parameters by name. For an adapter these are all that peft writes.
    """
    if not is_sharded(model):
        return model.save_pretrained
    reshard(model)
    state = trained if hasattr(model, "peft_config") else model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(state.items())}  # a tied tensor under its first name
    weights = {name: gather_tensors(tensor) for name, tensor in state.items() if once[id(tensor)] == name}
    return lambda folder, **options: model.save_pretrained(folder, state_dict=weights, **options)
