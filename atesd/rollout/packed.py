"""Packs the student's linear layers for fast decoding on a CPU: once per call, with adapters merged, then freed.

Decoding a small batch is bound by reading weights, and oneDNN reads them fastest in its own layout. A layer is packed
if it is a plain linear layer, or if peft's merge of its adapter gives such a layer with the same output. Every other
layer keeps its own forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn

from atesd.models.merging import adapted_modules, merge
from atesd.parallel.sharding import is_sharded
from atesd_kernels.backends.matmul import onednn_packs
from atesd_kernels.integrations.head import unwrap


class PackedLinear(nn.Module):
    """A linear layer, with its adapter merged, as one matrix in oneDNN's own layout, for fast decoding.

    Args:
        source: a plain or an adapted linear layer; an adapted one is a copy that shares its tensors.
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.source = [source]  # in a list, so that it is not registered as a child module
        self.weight = self.bias = None

    def pack(self, dtype: torch.dtype) -> None:
        linear = merge(self.source.pop())
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def packable_layers(model: nn.Module, problems: Container[str]) -> frozenset[str]:
    """Returns the names of the layers of `model` to pack: none if it is on another device or its weights are sharded.

    `problems`: names of adapted layers that their merge cannot stand in for (`merge_problems`).
    """
    if next(model.parameters()).device.type != "cpu" or is_sharded(model):
        return frozenset()
    base = unwrap(model)
    adapted = adapted_modules(base)
    inside = tuple(f"{name}." for name in adapted)
    names = {n for n, module in base.named_modules() if type(module) is nn.Linear and not f"{n}.".startswith(inside)}
    names |= {n for n, m in adapted.items() if type(getattr(m, "base_layer", None)) is nn.Linear and n not in problems}
    return frozenset(names)


def packed_twin(model: nn.Module, names: frozenset[str]) -> nn.Module:
    """Returns a copy of `model` that shares every parameter, with the layers in `names` replaced by `PackedLinear`."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = twin.get_submodule(parent)
        setattr(owner, child, PackedLinear(getattr(owner, child)))
    return twin


@contextlib.contextmanager
def decoding_model(model: nn.Module, dtype: torch.dtype, names: frozenset[str]) -> Iterator[nn.Module]:
    """Yields the model for decoding: a copy with the layers in `names` (`packable_layers`) packed, whose matrices are
    freed afterwards; without any, or if oneDNN has no layout for `dtype`, `model` itself."""
    training = model.training
    packed = []
    if names and onednn_packs(dtype):
        model = packed_twin(unwrap(model), names)
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
