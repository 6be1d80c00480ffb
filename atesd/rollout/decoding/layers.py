"""Packs the student's linear layers for fast decoding on a CPU: once per call, with adapters merged, then freed.

Decoding a small batch is bound by reading weights, and oneDNN reads them fastest in its own layout. Layers that read
the same input are packed as one matrix: one cast and one product instead of two or three. A layer is packed if it is a
plain linear layer, or if peft's merge of its adapter gives such a layer with the same output. Every other layer keeps
its own forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atesd.models.merging import adapted_modules, merge
from atesd.parallel.sharding import is_sharded
from atesd_kernels.backends.matmul import onednn_packs
from atesd_kernels.integrations.head import unwrap

# Children of one module that read the same input, by their names in transformers.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedProduct:
    """Linear layers with the same input as one matrix in oneDNN's own layout, with their adapters merged.

    Args:
        sources: plain or adapted linear layers; an adapted one is a copy that shares its tensors.
    """

    def __init__(self, sources: list[nn.Module]):
        self.sources = sources
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.read: Tensor | None = None  # the input of `outputs`
        self.outputs: dict[int, Tensor] = {}  # of layers that have not asked for theirs

    def pack(self, dtype: torch.dtype) -> None:
        weights, biases = [], []
        while self.sources:
            linear: Any = merge(self.sources.pop(0))
            weights.append(linear.weight.detach().to(dtype))
            biases.append(None if linear.bias is None else linear.bias.detach().to(dtype))
        self.rows = [len(weight) for weight in weights]
        if any(bias is not None for bias in biases):
            of_each = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in of_each])
        joint = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(joint, None)

    def free(self) -> None:
        self.weight = self.bias = self.read = None
        self.outputs = {}

    def output(self, layer: int, x: Tensor) -> Tensor:
        """Returns the output of one layer. The first layer that reads `x` computes those of all.

        It assumes that no layer changes `x` before the next one reads it.
        """
        if self.read is not x or layer not in self.outputs:
            assert self.weight is not None
            low = x.to(self.weight.dtype)
            product = torch.ops.mkldnn._linear_pointwise(low, self.weight, self.bias, "none", [], "")
            if len(self.rows) == 1:
                return product
            self.read, self.outputs = x, dict(enumerate(product.split(self.rows, -1)))
        output = self.outputs.pop(layer)
        if not self.outputs:
            self.read = None
        return output


class PackedLinear(nn.Module):
    """One of the layers of a `PackedProduct`. `weight` and `bias`, which some models look at, are the product's."""

    def __init__(self, product: PackedProduct, layer: int):
        super().__init__()
        self.product, self.layer = product, layer

    @property
    def weight(self) -> Tensor | None:
        return self.product.weight

    @property
    def bias(self) -> Tensor | None:
        return self.product.bias

    def __call__(self, x: Tensor) -> Tensor:
        """Without the hooks that `nn.Module` looks for: a decoded token calls hundreds of layers."""
        return self.product.output(self.layer, x)


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


def packed_twin(model: nn.Module, names: frozenset[str]) -> tuple[nn.Module, list[PackedProduct]]:
    """Returns a copy of `model` that shares every parameter, with the layers in `names` replaced by `PackedLinear`, and
    the products of these."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    products = []
    for group in groups_of(twin, names):
        product = PackedProduct([twin.get_submodule(name) for name in group])
        for layer, name in enumerate(group):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, PackedLinear(product, layer))
        products.append(product)
    return twin, products


def groups_of(model: nn.Module, names: frozenset[str]) -> list[list[str]]:
    """Returns `names` in groups of `SIBLINGS` with inputs of one size; each of the others by itself."""
    left, groups = set(names), []
    for parent in {name.rpartition(".")[0] for name in names}:
        for siblings in SIBLINGS:
            group = [f"{parent}.{child}" for child in siblings]
            if left.issuperset(group) and len({model.get_submodule(name).in_features for name in group}) == 1:
                groups.append(group)
                left.difference_update(group)
    return groups + [[name] for name in left]


@contextlib.contextmanager
def decoding_model(model: nn.Module, dtype: torch.dtype, names: frozenset[str]) -> Iterator[nn.Module]:
    """Yields the model for decoding: a copy with the layers in `names` (`packable_layers`) packed, whose matrices are
    freed afterwards; without any, or if oneDNN has no layout for `dtype`, `model` itself.

    A copy decodes in inference mode, without autograd's bookkeeping at each of many small operations. `model` does not:
    it might keep a tensor of that mode, which training cannot use.
    """
    training = model.training
    products: list[PackedProduct] = []
    if names and onednn_packs(dtype):
        model, products = packed_twin(unwrap(model), names)
        for product in products:
            product.pack(dtype)
    model.eval()
    try:
        with torch.inference_mode() if products else contextlib.nullcontext():
            yield model
    finally:
        model.train(training)
        for product in products:  # free them now, not at the next garbage collection
            product.free()
