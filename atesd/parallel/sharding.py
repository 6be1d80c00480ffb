"""Weights in shards: FSDP2 (`fully_shard`) as an accelerate config asks for it, and when what is whole.

Separate from the trainer because it is about where weights lie. FSDP2 is asked to add gradients up, not to average
them: the loss is divided by the tokens of all processes already. What DeepSpeed's ZeRO-3 shards is known here by its
`ds_id`; its engine is in `zero`.

| what                              | whole                                                            |
|-----------------------------------|------------------------------------------------------------------|
| the weights of a layer            | during its forward and backward                                  |
| the head, as the loss reads it    | always; a trained one is exchanged once a step (`sharded_head`)  |
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

from atesd_kernels.integrations.head import unwrap

# whether a model's layers go back to shards between forward and backward (ZeRO-3), or only afterwards (ZeRO-2)
RESHARDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
BORROWER = -1  # the number, which no module has, of who else uses a parameter of ZeRO-3


class ShardingError(ValueError):
    """An accelerate config that asks for what is not supported here: the message names the setting and the remedy."""


def asked_for(variable: str) -> bool:
    """Whether `accelerate launch` has set this variable, as it does from its config."""
    return os.environ.get(variable, "false").lower() == "true"


def check_launcher() -> None:
    """Raises ShardingError for what `accelerate launch` was asked for and this project does not do; accelerate itself
    would fail later, or on a CPU leave it out silently."""
    if asked_for("ACCELERATE_USE_MEGATRON_LM"):
        raise ShardingError(
            "the accelerate config asks for Megatron-LM, which is not supported: start from one in recipes/accelerate."
        )
    if asked_for("ACCELERATE_USE_DEEPSPEED"):
        from atesd.parallel.zero import unsupported

        if what := unsupported():
            raise ShardingError(f"the accelerate config does not work here: {what}.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ShardingError(
            f"the accelerate config sets mixed_precision to {precision!r}; the recipe's bf16 decides here: set "
            "mixed_precision to 'no'."
        )


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The FSDP2 settings of an accelerate config; None where it has none.

    Raises:
        ShardingError: FSDP settings that do not work here.
    """
    if not asked_for("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
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


def shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin, device: torch.device) -> None:
    """Shard `model` (bare or under peft) in place over all processes: each layer, an untied head, and the rest."""
    base = unwrap(model)
    names = set(plugin.transformer_cls_names_to_wrap or base._no_split_modules)
    parts = [module for module in base.modules() if type(module).__name__ in names]
    head = base.get_output_embeddings()
    if head.weight is not base.get_input_embeddings().weight:
        parts.append(head)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    RESHARDS[base] = bool(plugin.reshard_after_forward)
    for module in (*parts, base):
        fully_shard(module, mesh=mesh, reshard_after_forward=RESHARDS[base])
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def zero3_parameters(model: nn.Module) -> list[Any]:
    """The parameters that DeepSpeed's ZeRO-3 holds in shards: a process a piece of the flattened one, `ds_tensor`."""
    return [p for p in model.parameters() if hasattr(p, "ds_id")]


def in_shards(model: nn.Module) -> bool:
    """Whether no process holds all weights, so that a forward is a message as well."""
    return bool(sharded_modules(model) or zero3_parameters(model))


def held(parameter: Tensor) -> Tensor:
    """What this process keeps of a parameter: a DTensor of FSDP2's, the piece of ZeRO-3's, or all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()


@contextlib.contextmanager
def lent(parameters: list[Any]) -> Iterator[None]:
    """ZeRO-3's parameters whole on every process for the length of the block, and to be read only."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        for p in parameters:
            p.ds_active_sub_modules.add(BORROWER)  # or the first forward would give them back
        try:
            yield
        finally:
            for p in parameters:
                p.ds_active_sub_modules.discard(BORROWER)


def reshard(model: nn.Module) -> None:
    """Back to shards, where a forward without gradient has left something whole; nothing without FSDP2."""
    for module in sharded_modules(model):
        module.reshard()


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights whole on every process, and no forward sends a message: each may make as many as it likes."""
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with lent(zero3_parameters(model)):
            yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(RESHARDS[unwrap(model)], recurse=False)
            module.reshard()


def on_main(value: Tensor) -> Tensor | None:
    return value.cpu() if torch.distributed.get_rank() == 0 else None


def whole(value: Any) -> Any:
    """`value`, a tensor or dicts, lists and tuples with tensors, every sharded tensor whole: on the main process's CPU,
    one after another, and None on the other processes."""
    if hasattr(value, "ds_id"):
        with lent([value]):
            return on_main(value.detach())
    if isinstance(value, DTensor):
        return on_main(value.detach().full_tensor())
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, the same whole tensor on every process, in shards as `like`; itself where `like` is not sharded."""
    if hasattr(like, "ds_id"):
        size, rank = like.ds_tensor.numel(), torch.distributed.get_rank()
        piece = value.flatten()[rank * size : (rank + 1) * size].to(like.ds_tensor)
        return nn.functional.pad(piece, (0, size - len(piece)))
    if not isinstance(like, DTensor):
        return value
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved optimizer state, whole, cut as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        index: {
            name: cut_like(v, parameters[index]) if torch.is_tensor(v) and v.shape == parameters[index].shape else v
            for name, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": cut}


def writer(model: nn.Module, trained: dict[str, Tensor]) -> Callable[..., None]:
    """`model.save_pretrained` as the main process can call it alone. All processes make one: it gathers the weights.

    Args:
        trained: the trained parameters by name: an adapter's are all that peft writes.
    """
    if not in_shards(model):
        return model.save_pretrained
    reshard(model)
    state = trained if hasattr(model, "peft_config") else model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(state.items())}  # a tied tensor under its first name
    weights = {name: whole(tensor) for name, tensor in state.items() if once[id(tensor)] == name}
    return lambda folder, **options: model.save_pretrained(folder, state_dict=weights, **options)
