"""DeepSpeed's ZeRO-2 and ZeRO-3, as an accelerate config asks for them.

DeepSpeed has its own engine: forward and step go through it. Loss, schedule and checkpoints are those of every run, and
checkpoints hold full tensors. DeepSpeed is imported only when the launcher asks for it.

|                         | ZeRO-2                                 | ZeRO-3                                |
|-------------------------|----------------------------------------|---------------------------------------|
| weights                 | replicated                             | sharded, gathered while a layer runs  |
| gradients, Adam's means | sharded                                | sharded                               |
| a trained head          | the loss reads the weight itself       | the loss reads a copy, new every step |
| its gradient            | accumulated outside DeepSpeed and handed over once a step, for both            |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from atesd.parallel.sharding import shard_like
from atesd_kernels.integrations.backbone import as_output, backbone_forward
from atesd_kernels.integrations.head import HeadSpec, through, unwrap
from atesd_kernels.integrations.sharded_head import gather_head

OLDEST = "0.19.8"  # the oldest version with `managed_gradient_accumulation`
STATES = ("exp_avg", "exp_avg_sq")  # AdamW's, by its own names


def unsupported() -> str | None:
    """Why the DeepSpeed settings of `accelerate launch` cannot be used; None if they can."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return "it asks for DeepSpeed, which is not installed: pip install 'atesd[deepspeed]'"
    if Version(found) < Version(OLDEST):
        return f"it asks for DeepSpeed, and {found} is installed, older than {OLDEST}: pip install 'atesd[deepspeed]'"
    get = os.environ.get
    for wrong, what in (
        (get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none", "deepspeed_config_file is not read: write "
         "zero_stage as recipes/accelerate/zero2.yaml does"),
        (stage() not in (2, 3), "zero_stage must be 2 or 3 (without shards: recipes/accelerate/ddp.yaml)"),
        (get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none",
         "offload_optimizer_device must be none"),
        (get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none", "offload_param_device must be none"),
        (stage() == 3 and get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true").lower() == "true",
         "zero3_init_flag must be false: all load the model"),
        (get("ACCELERATE_GRADIENT_CLIPPING", "auto") not in ("auto", "none"), "gradient_clipping must be left out: the "
         "recipe's max_grad_norm decides"),
    ):  # fmt: skip
        if wrong:
            return what
    return None


def stage() -> int:
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


class Zero:
    """DeepSpeed's engine around a model and its AdamW.

    Args:
        model: bare or under peft, replicated on every process; ZeRO-3 shards it in place.
        optimizer: AdamW over its trained parameters, one group. From here on its states are those of DeepSpeed's flat
            shards; the learning rate stays in it.
        max_grad_norm: the global gradient norm is clipped to it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, device: torch.device):
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it may find another one that cannot be used
        import deepspeed

        self.model, self.optimizer, self.device, self.stage = model, optimizer, device, stage()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # these two are unused: the loop counts micro-batches
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,  # the loop says when to step
                "gradient_clipping": max_grad_norm,
                "steps_per_print": 2**31,
                "zero_optimization": {
                    "stage": self.stage,
                    "stage3_param_persistence_threshold": 0,  # all weights in shards
                    # prefetching follows what a process ran before, which differs between ranks: it would deadlock
                    "stage3_prefetch_bucket_size": 0,
                    "stage3_max_reuse_distance": 0,
                    "stage3_max_live_parameters": 0,
                },
            },
        )
        self.count = torch.distributed.get_world_size()
        self.own_head, self.head = unwrap(model).get_output_embeddings(), None
        self.gather_head()

    def backbone_and_head(self, head: HeadSpec) -> tuple[Callable[..., Any], HeadSpec]:
        """Replacements for `hidden_states_and_head`'s pair, through which DeepSpeed sees the gradients.

        The hidden states' gradients reach it in backward, a trained head's when `reduce_head` is called.
        """
        backbone = backbone_forward(self.model)

        def call(**inputs: Any) -> Any:
            device = self.device.type
            asked = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

            def forward(**kwargs: Any) -> Any:  # the engine switches autocast off, unless it may do it its own way
                with torch.autocast(device, cache_enabled=torch.is_autocast_cache_enabled(), **asked):
                    return backbone(**kwargs)

            return as_output(through(self.engine, self.model, forward, **inputs))

        if head.weight.requires_grad and self.stage == 2:  # the same memory, and no hook of DeepSpeed's
            bias = None if head.bias is None else head.bias.detach().requires_grad_()
            head = replace(head, weight=head.weight.detach().requires_grad_(), bias=bias)
        self.head = head
        return call, head

    def loss_for_backward(self, part_loss: Tensor, so_far: Tensor) -> Tensor:
        """Undo DeepSpeed's division by the number of processes.

        DeepSpeed skips a step only for a non-finite gradient, so a non-finite loss makes the gradient NaN too.
        """
        return part_loss * (self.count + 0 * (so_far + part_loss.detach()))

    def gather_head(self) -> None:
        """Gather a trained head's weight from its shards. A no-op for ZeRO-2, which does not shard weights."""
        if self.stage == 3 and self.own_head.weight.requires_grad:
            gather_head(self.model)

    def reduce_head(self) -> None:
        """Hand a trained head's accumulated gradient to DeepSpeed, by a backward of its own."""
        own, read = self.own_head, self.head
        if read is None or not own.weight.requires_grad:
            return
        pairs = [(name, getattr(read, name).grad) for name in ("weight", "bias") if getattr(read, name) is not None]
        if self.stage == 3:
            self.forget_untied_gradient()

        def product() -> Tensor:
            return sum((getattr(own, name) * gradient).sum() for name, gradient in pairs if gradient is not None)

        through(self.engine, self.model, lambda: through(own, own, product)).backward()
        for name, _ in pairs:
            getattr(read, name).grad = None

    def forget_untied_gradient(self) -> None:
        """Zero ZeRO-3's gradient of an untied head.

        ZeRO-3 resets gradients in a step's first backward. The head is not part of it and would keep the last step's.
        """
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        embedding = unwrap(self.model).get_input_embeddings().weight
        for p in self.own_head.parameters():
            if p is not embedding:
                safe_set_local_grad(p, torch.zeros_like(safe_get_local_grad(p)).narrow(0, 0, p.ds_tensor.numel()))

    def step(self) -> float | None:
        """Clip and step. Returns the gradients' norm; None, and no step, if it is not finite."""
        self.reduce_head()
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state in one process's format: full tensors, gathered one by one onto the main process's CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        main, states = torch.distributed.get_rank() == 0, {}
        known = next(iter(self.optimizer.state.values()), {})
        for index, p in enumerate(self.trained if known else ()):
            full = {name: safe_get_full_optimizer_state(p, name) for name in STATES}
            full = {
                name: value.reshape(getattr(p, "ds_shape", p.shape)).cpu() if main else None
                for name, value in full.items()
            }
            states[index] = {"step": known["step"].clone(), **full}
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        return {"state": states, "param_groups": [{**group, "params": list(range(len(self.trained)))}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for any number of processes. Every process passes the full tensors."""
        group = {key: value for key, value in state["param_groups"][0].items() if key != "params"}
        self.optimizer.param_groups[0].update(group)
        if not state["state"]:
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = self.engine.optimizer
        for flat in zero.single_partition_of_fp32_groups if self.stage == 2 else zero.fp32_partitioned_groups_flat:
            empty = {name: torch.zeros_like(flat) for name in STATES}
            self.optimizer.state[flat] = {"step": state["state"][0]["step"].clone(), **empty}
        if self.stage == 2:
            zero._lazy_init_hp_params_optimizer_state()
        for index, p in enumerate(self.trained):
            for name in STATES:
                value = state["state"][index][name].to(self.device)
                if self.stage == 2:
                    safe_set_full_optimizer_state(p, value, name)
                else:
                    safe_set_local_optimizer_state(p, shard_like(value, p), name)

    def load_weight(self, p: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter to `value`, the same full tensor on every process."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = value.to(device=self.device, dtype=torch.float32)
        if self.stage == 2:
            p.data.copy_(value)
            safe_set_full_fp32_param(p, value)
        else:
            p.ds_tensor.data.copy_(shard_like(value, p))
            safe_set_local_fp32_param(p, shard_like(value, p))
