"""Packs the student's linear layers for fast decoding on a CPU: once per call, with adapters merged, then freed.

Decoding a small batch is bound by reading weights, and oneDNN reads them fastest in its own layout.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atesd.parallel.sharding import is_sharded
from atesd_kernels.integrations.head import unwrap


class PackedLinear(nn.Module):
    """A linear layer and its LoRA update as one matrix in oneDNN's own layout, for fast decoding."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.sources = [source]  # in a list, so that it is not registered as a child module
        self.weight = self.bias = None

    def pack(self, dtype: torch.dtype) -> None:
        source = self.sources[0]
        linear = getattr(source, "base_layer", source)
        weight = linear.weight
        for adapter in getattr(source, "active_adapters", ()):
            if adapter in source.lora_A:
                weight = weight + source.get_delta_weight(adapter)
        self.bias = None if linear.bias is None else linear.bias.to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def can_pack(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer, bare or with plain LoRA. DoRA and others keep their own forward."""
    if type(module) is nn.Linear:
        return True
    plain = hasattr(module, "get_delta_weight") and type(getattr(module, "base_layer", None)) is nn.Linear
    return plain and not any(getattr(module, "use_dora", {}).values())


def packed_twin(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` that shares every parameter, with its linear layers replaced by `PackedLinear`."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()

    def replace_linear(twin: nn.Module, source: nn.Module) -> None:
        for name, child in source.named_children():
            if can_pack(child):
                setattr(twin, name, PackedLinear(child))
            else:
                replace_linear(getattr(twin, name), child)

    replace_linear(twin, model)
    return twin


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its own layout for matrices of `dtype` on this processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def decoding_model(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Yields the model for decoding: on a CPU a packed copy, whose matrices are freed afterwards; on other devices, or
    if the weights are sharded, `model` itself."""
    training = model.training
    packed = []
    if next(model.parameters()).device.type == "cpu" and onednn_packs(dtype) and not is_sharded(model):
        model = packed_twin(unwrap(model))
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        for module in packed:
            module.pack(dtype)
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
        for module in packed:  # free them now, not at the next garbage collection
            module.weight = module.bias = None
