"""Switches of a peft adapter's layers that a step flips often, without what peft's own switches do beside it.

Separate from teachers.py because the student has a switch too. `PeftModel.disable_adapter` asks every module for a
status report and sets `requires_grad` of every adapter weight, there and back: for the 28 layers of Qwen3-1.7B about
100 ms of Python a micro-batch, in which a GPU gets nothing to do. What the layers read is one attribute each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers peft has put into `model`; none without peft."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def with_attribute(modules: Iterable[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Each of `modules` that has an attribute `name` of its own has `value` there, and afterwards what it had.

    Past `nn.Module.__setattr__`, which looks for parameters and takes ten times as long.
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
    """Whether one attribute of each adapter layer switches the whole adapter off.

    Not so for copies of whole modules (`modules_to_save`), which are wrappers with a switch of their own.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = adapter_layers(model)
    wrapped = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    return bool(layers) and not wrapped and all("_disable_adapters" in layer.__dict__ for layer in layers)


def adapter_off(layers: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """A forward within it gives the base model's output. Adapter weights go on requiring gradients: it is for forwards
    under `no_grad`. `layers` are the `adapter_layers` of a model that `has_plain_switch`."""
    return with_attribute(layers, "_disable_adapters", True)


def inputs_cast_by_autocast(layers: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """peft hands a layer's input to its adapter in the adapter's dtype, float32, and autocast rounds it back: with this
    the bfloat16 input goes straight into the product, which gives the same numbers. With LoRA dropout it would not.

    Saves, for each linear layer, two passes over its input in forward and in backward, and the rounded copy that
    autograd keeps. Only under autocast: without it the product would meet two dtypes. `layers` are `adapter_layers`.
    """
    return with_attribute(layers, "cast_input_dtype_enabled", False)
