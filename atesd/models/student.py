"""The student in training: its model, trained parameters, optimizer, learning rate schedule and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from atesd.config import ATESDConfig
from atesd.errors import ModelError
from atesd.files import share_with_readers
from atesd.models.adapters import adapter_layers, inputs_cast_by_autocast
from atesd.models.attention.packed import check_packing, use_packed_attention
from atesd.models.loading import bars_of_long_loads
from atesd.models.precision import fast_fp32_products
from atesd.parallel.parallelism import Parallelism
from atesd.parallel.sharding import is_sharded, reshard, writer
from atesd_kernels.integrations.embedding import accumulate_in_place
from atesd_kernels.integrations.head import HeadError, hidden_states_and_head, unwrap


class Student:
    """Prepares a loaded model for training: packed attention, checks, sharding, optimizer, schedule.

    Args:
        config: the run's settings.
        model: the output of `load_model`.
        tokenizer: saved with the weights of a model without LoRA.
        parallelism: places or shards the weights, and runs the optimizer step.

    Attributes:
        model: on this process's device, or sharded.
        trained: the trained parameters by name.
        backbone, head: the forward up to the hidden states, and the output head in the form that the loss takes.

    Raises:
        ModelError: the loss does not support the head, or packed rows do not work with the attention.
    """

    def __init__(self, config: ATESDConfig, model: nn.Module, tokenizer: Any, parallelism: Parallelism):
        self.config, self.tokenizer, self.parallelism = config, tokenizer, parallelism
        self.device = parallelism.device
        use_packed_attention(unwrap(model))
        self.model = parallelism.place(model)
        # flash-attention does not support float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.attn_implementation != "sdpa"):
            with reraise_as_model_error():
                hidden_states_and_head(self.model)
            check_packing(self.model)
        reshard(self.model)
        if type(parallelism) is Parallelism:  # sharded weights and DeepSpeed see to their gradients themselves
            accumulate_in_place(unwrap(self.model))
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # avoids a temporary the size of the model
        )
        parallelism.prepare(self.model, self.trained, self.optimizer, config.max_grad_norm)
        self.backbone, self.head = parallelism.backbone_and_head()
        self.adapter_layers = adapter_layers(self.model) if config.bf16 and not config.lora_dropout else []
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, config.warmup_steps, num_training_steps=config.max_steps
        )

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context for every forward: autocast if `bf16`, fast float32 matmuls on a CPU, no adapter input casts.

        Enter one context for several forwards, so that each weight is cast once. The cast cache is off for sharded
        weights, which are gathered again for each layer.
        """
        cached = not is_sharded(self.model)
        with (
            fast_fp32_products(self.device),
            inputs_cast_by_autocast(self.adapter_layers),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=cached),
        ):
            yield

    def step(self, loss: float) -> float | None:
        """Clips, steps and clears the gradients. Returns their norm; None (no step) if it or `loss` is not finite."""
        norm = self.parallelism.step(loss)
        if norm is not None:
            self.parallelism.gather_head()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def writer(self) -> Callable[..., None]:
        """Returns a function that writes the adapter, or the model and its tokenizer, into a folder.

        Call this on every process, since it gathers sharded weights. Call the returned function on the main process.
        """
        write = writer(self.model, self.trained)

        def write_all(folder: Any, **options: Any) -> None:
            with bars_of_long_loads():
                write(folder, **options)
            if not self.config.use_peft:
                self.tokenizer.save_pretrained(folder)
            share_with_readers(Path(folder))

        return write_all

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.parallelism.optimizer_state(), "scheduler": self.scheduler.state_dict()}
        return {"trained": self.trained, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parallelism.load_weights(state["trained"])
        self.parallelism.load_optimizer_state(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # `--resume` may change the learning rate: the config overrides the saved value
        self.scheduler.base_lrs = [self.config.learning_rate] * len(self.scheduler.base_lrs)
        for group, rate, shape in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = rate * shape(self.scheduler.last_epoch)


@contextmanager
def reraise_as_model_error() -> Iterator[None]:
    try:
        yield
    except HeadError as error:
        raise ModelError(str(error)) from error
