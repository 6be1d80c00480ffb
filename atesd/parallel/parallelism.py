"""How the model's weights are spread over processes: all on each (one process, DDP), FSDP2 or DeepSpeed.

The trainer asks one `Parallelism` object and does not know which it has. `accelerate launch` decides, through its
environment variables. With DDP no wrapper is used: gradients are all-reduced once a step, before they are clipped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn

from atesd.parallel.processes import Processes
from atesd.parallel.sharding import (
    ShardingError,
    env_flag,
    fsdp_plugin,
    optimizer_state_like,
    shard,
    shard_like,
)
from atesd.parallel.zero import Zero, unsupported
from atesd_kernels.integrations.head import HeadSpec, hidden_states_and_head, unwrap
from atesd_kernels.integrations.sharded_head import gather_head, reduce_head_gradient


def check_launcher() -> None:
    """Refuse settings of `accelerate launch` that are not supported here.

    accelerate itself would fail later, or ignore them silently on a CPU.

    Raises:
        ShardingError: Megatron-LM, a DeepSpeed setting that does not work here, or a mixed precision.
    """
    if env_flag("ACCELERATE_USE_MEGATRON_LM"):
        raise ShardingError(
            "the accelerate config asks for Megatron-LM, which is not supported: start from one in recipes/accelerate."
        )
    if env_flag("ACCELERATE_USE_DEEPSPEED") and (what := unsupported()):
        raise ShardingError(f"the accelerate config does not work here: {what}.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ShardingError(
            f"the accelerate config sets mixed_precision to {precision!r}; the recipe's bf16 decides here: set "
            "mixed_precision to 'no'."
        )


def make_parallelism(accelerator: Accelerator, processes: Processes) -> Parallelism:
    """What the launcher asked for.

    Raises:
        ShardingError: FSDP settings that do not work here.
    """
    if plugin := fsdp_plugin(accelerator):
        return FSDP2(processes, accelerator.device, plugin)
    if env_flag("ACCELERATE_USE_DEEPSPEED") and processes.count > 1:
        return DeepSpeed(processes, accelerator.device)
    return Parallelism(processes, accelerator.device)


class Parallelism:
    """One process or DDP: each process holds all weights, and gradients are all-reduced before the step.

    The order of the calls: `place` the model, `prepare` it with its optimizer, then `backbone_and_head`.

    Attributes:
        shards_teacher: whether `place_teacher` shards.
    """

    shards_teacher = False

    def __init__(self, processes: Processes, device: torch.device):
        self.processes, self.device = processes, device

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this process's device, or its shards of it."""
        return model.to(self.device)

    def place_teacher(self, model: nn.Module, device: torch.device) -> nn.Module:
        """A frozen model of its own on `device`, or this process's shards of it. `step` does not know of it."""
        return model.to(device)

    def prepare(
        self, model: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        """Take what `step` works on. `trained` holds the trained parameters by name."""
        self.model, self.trained, self.optimizer, self.max_grad_norm = model, trained, optimizer, max_grad_norm

    def backbone_and_head(self) -> tuple[Callable[..., Any], HeadSpec]:
        """The forward that stops at the hidden states, and the head as the loss reads it."""
        return hidden_states_and_head(self.model)

    def loss_for_backward(self, part_loss: Tensor, loss_so_far: Tensor) -> Tensor:
        """A micro-batch's loss as `backward` needs it; `loss_so_far` is the sum over the micro-batches before it."""
        return part_loss

    def step(self, loss: float) -> float | None:
        """Clip the gradients and step. Returns their norm, or None and makes no step if it or `loss` is not finite."""
        norm = self.clipped_gradient_norm()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:  # a step without gradients changes nothing; the schedule still counts it
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        return norm if finite else None

    def clipped_gradient_norm(self) -> float:
        """All-reduce the gradients, clip them and return their norm. Each rank holds its own share before the call."""
        if self.processes.count > 1:
            for p in self.trained.values():
                p.grad = self.processes.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
        return float(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm))

    def gather_head(self) -> None:
        """After the weights have changed: gather a trained, sharded head, so that the loss reads the new one."""

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(optimizer_state_like(state, self.optimizer))

    def load_weights(self, values: dict[str, Tensor]) -> None:
        """Set the trained parameters. `values` holds their full tensors, the same ones on every process."""
        with torch.no_grad():
            for name, p in self.trained.items():
                self.load_weight(p, values[name])
        self.gather_head()

    def load_weight(self, p: nn.Parameter, value: Tensor) -> None:
        p.copy_(shard_like(value, p))


class FSDP2(Parallelism):
    """torch's `fully_shard`: weights, gradients and optimizer states are sharded, and a teacher's weights."""

    shards_teacher = True

    def __init__(self, processes: Processes, device: torch.device, plugin: FullyShardedDataParallelPlugin):
        super().__init__(processes, device)
        self.plugin = plugin

    def place(self, model: nn.Module) -> nn.Module:
        self.model = model
        shard(model, self.plugin, self.device)
        self.gather_head()
        return model

    def place_teacher(self, model: nn.Module, device: torch.device) -> nn.Module:
        shard(model, self.plugin, device, has_backward=False)
        return model

    def clipped_gradient_norm(self) -> float:
        """Reduces the head's gradient, which FSDP2 leaves to us, clips all gradients and returns their norm."""
        if self.trains_head():
            reduce_head_gradient(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)
        return float(norm.full_tensor())

    def gather_head(self) -> None:
        if self.trains_head():
            gather_head(self.model)

    def trains_head(self) -> bool:
        return unwrap(self.model).get_output_embeddings().weight.requires_grad


class DeepSpeed(Parallelism):
    """ZeRO-2 or ZeRO-3, in DeepSpeed's own engine (`zero.py`)."""

    def prepare(
        self, model: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        super().prepare(model, trained, optimizer, max_grad_norm)
        self.zero = Zero(model, optimizer, max_grad_norm, self.device)

    def backbone_and_head(self) -> tuple[Callable[..., Any], HeadSpec]:
        _, head = super().backbone_and_head()
        return self.zero.backbone_and_head(head)

    def loss_for_backward(self, part_loss: Tensor, loss_so_far: Tensor) -> Tensor:
        return self.zero.loss_for_backward(part_loss, loss_so_far)

    def step(self, loss: float) -> float | None:
        return self.zero.step()

    def gather_head(self) -> None:
        self.zero.gather_head()

    def optimizer_state(self) -> dict[str, Any]:
        return self.zero.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.zero.load_state_dict(state)

    def load_weight(self, p: nn.Parameter, value: Tensor) -> None:
        self.zero.load_weight(p, value)
