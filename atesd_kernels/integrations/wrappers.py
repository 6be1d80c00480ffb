"""Unwraps models from torch.compile, DDP and peft, and runs a function through such a wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .head_spec import HeadError


def without_wrappers(model: Any) -> Any:
    """Removes torch.compile and DDP / DataParallel. Returns a causal language model, or peft's model of one."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):  # not hasattr: peft forwards its model's attributes
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def unwrap(model: Any) -> Any:
    """Removes torch.compile, DDP / DataParallel and peft. Returns the causal language model."""
    while True:
        model = without_wrappers(model)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            peft = model.active_peft_config
            if getattr(peft, "is_prompt_learning", False):
                raise HeadError(
                    f"peft method {peft.peft_type} adds virtual tokens in front of the model, so hidden states cannot "
                    "be taken from its backbone. Use an adapter inside the layers (LoRA, DoRA, IA3)."
                )
            model = model.get_base_model()
        else:
            return model


def through(wrapper: Callable[..., Any], inner: nn.Module, function: Callable[..., Any], **inputs: object) -> Any:
    """Calls `function` in place of the forward of `inner`, through a call of `wrapper`. Returns the wrapper's result.

    DDP reduces gradients, and FSDP gathers parameters, only around a call of the wrapper itself.
    """
    had_own = "forward" in vars(inner)
    forward = inner.forward

    def restore() -> None:
        if had_own:
            inner.forward = forward
        elif "forward" in vars(inner):
            del inner.forward

    def once(*args: object, **kwargs: object) -> object:
        restore()
        return function(*args, **kwargs)

    inner.forward = once
    try:
        return wrapper(**inputs)
    finally:
        restore()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which `model` and all its modules are in eval mode. Restores the mode of each."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
