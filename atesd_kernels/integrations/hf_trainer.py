"""The Hugging Face Trainer with a divergence as its loss. Its dataset has rows for `pairs.collate`.

trainer = SelfDistillationTrainer(model, args, train_dataset=rows, loss_options={"entry_clip": 0.05})
trainer.train()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .pairs import collate, pair_losses


class SelfDistillationTrainer(Trainer):
    """`transformers.Trainer` on rows with `prompt_ids`, `teacher_prompt_ids` and `response_ids`.

    Args:
        teacher: see `pair_divergence`; None means the model without its peft adapters.
        loss_options: more options for `pair_divergence`.

    The other arguments are the Trainer's. The loss is the mean over the response tokens of the optimizer step. A
    mixture of experts' auxiliary loss is added as in `pair_divergence`. It is logged as `aux_loss`, without its
    coefficient.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, loss_options: dict[str, Any] | None = None, **kwargs: Any
    ):
        kwargs.setdefault("data_collator", collate)
        super().__init__(*args, **kwargs)
        self.teacher, self.loss_options = teacher, loss_options or {}
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of the step
        self.aux_losses: list[Tensor] = []  # since the last line of the log

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self.accelerator.autocast():
            loss, aux_loss = pair_losses(
                model, inputs, self.teacher, num_tokens=num_items_in_batch, **self.loss_options
            )
        if aux_loss is not None:
            self.aux_losses.append(aux_loss)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is global, and DDP averages gradients
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.aux_losses and "loss" in logs:
            mean = torch.stack(self.aux_losses).mean()
            logs["aux_loss"] = float(self.accelerator.gather(mean).mean())
            self.aux_losses.clear()
        super().log(logs, *args, **kwargs)
