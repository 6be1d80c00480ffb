"""The model under what torch.compile, DDP and peft wrap around it, and calls that go through such a wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def without_wrappers(model: Any) -> Any:
    """What torch.compile and DDP / DataParallel have wrapped: a causal language model, or peft's model of one."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):  # its own: peft shows its model's attributes as well
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def unwrap(model: Any) -> Any:
    """The causal language model under torch.compile, DDP / DataParallel and peft wrappers."""
    while True:
        model = without_wrappers(model)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            peft = model.active_peft_config
            if getattr(peft, "is_prompt_learning", False):
                raise ValueError(
                    f"peft method {peft.peft_type} adds virtual tokens in front of the model, so hidden states cannot "
                    "be taken from its backbone. Use an adapter inside the layers (LoRA, DoRA, IA3)."
                )
            model = model.get_base_model()
        else:
            return model


def through(wrapper: nn.Module, inner: nn.Module, function: Callable[..., Any], **inputs: object) -> object:
    """Call `function` as the forward of `inner`, so that `wrapper` sees a forward pass and prepares its gradients.

    DDP exchanges gradients, and FSDP gathers parameters, only around a call of the wrapper itself.
    """
    had_own = "forward" in vars(inner)
    forward = inner.forward

    def restore() -> None:
        if had_own:
            inner.forward = forward
        elif "forward" in vars(inner):
            del inner.forward

    def once(**kwargs: object) -> object:
        restore()
        return function(**kwargs)

    inner.forward = once
    try:
        return wrapper(**inputs)
    finally:
        restore()
