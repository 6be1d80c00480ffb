"""Fast switches for the layers of a peft adapter: turn the adapter off, and skip its input cast.

`PeftModel.disable_adapter` queries the status of every module and sets `requires_grad` of every adapter weight, on
entry and on exit. For the 28 layers of Qwen3-1.7B this is about 100 ms of Python a micro-batch, during which the GPU
idles. The layers themselves read one attribute each, so this file sets only that attribute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that peft added to `model`; an empty list if `model` is not a peft model."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def with_attribute(modules: Iterable[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Sets attribute `name` to `value` within the context, and restores the old values on exit.

    Skips modules without an instance attribute `name`. Writes to `__dict__`: `nn.Module.__setattr__` is 10x slower.
    """
    own = [module.__dict__ for module in modules if name in module.__dict__]
    before = [attributes[name] for attributes in own]
    for attributes in own:
        attributes[name] = value
    try:
        yield
    finally:
        for attributes, was in zip(own, before, strict=True):
            attributes[name] = was


def has_plain_switch(model: nn.Module) -> bool:
    """Whether setting one attribute of each adapter layer disables the entire adapter.

    False with `modules_to_save`: peft wraps the copied modules, and the wrappers have a switch of their own.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = adapter_layers(model)
    wrapped = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    return bool(layers) and not wrapped and all("_disable_adapters" in layer.__dict__ for layer in layers)


def adapter_off(layers: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Disables the adapter within the context. Use it under `no_grad` only: adapter weights keep `requires_grad`.
    `layers` are the `adapter_layers` of a model for which `has_plain_switch` is true."""
    return with_attribute(layers, "_disable_adapters", True)


def inputs_cast_by_autocast(layers: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Stops peft from casting a layer's input to the adapter's float32, which autocast would cast back to bfloat16.

    The results are identical, except with LoRA dropout. For each linear layer this saves two passes over its input in
    forward and in backward, and the cast copy that autograd keeps. Use it only under autocast: without autocast the
    matmul would get two dtypes. `layers` are `adapter_layers`.
    """
    return with_attribute(layers, "cast_input_dtype_enabled", False)
