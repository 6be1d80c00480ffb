"""A LightningModule with a divergence as its loss. Its batches come from `pairs.collate`.

module = SelfDistillationModule(model, learning_rate=5e-6, loss_options={"entry_clip": 0.05})
Trainer(max_steps=100).fit(module, DataLoader(rows, batch_size=4, collate_fn=collate))

Lightning does not count a step's tokens in advance. So each batch's loss is a sum, and a hook divides the gradient by
the count before it is clipped and the optimizer steps.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from .pairs import IGNORED, pair_losses


class SelfDistillationModule(LightningModule):
    """Distils `teacher` (None: the model without its peft adapters) into `model`, with AdamW on trainable parameters.

    The loss is the mean over the response tokens of the optimizer step, on all devices. Accumulating batches with
    `accumulate_grad_batches` equals one large batch. A mixture of experts' auxiliary loss is added as in
    `pair_divergence`, and logged without its coefficient as `aux_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        learning_rate: float = 5e-6,
        loss_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model, self.teacher = model, teacher
        self.learning_rate, self.loss_options = learning_rate, loss_options or {}
        self.num_tokens = 0  # since the last step, on this device

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        total, aux_loss = pair_losses(self.model, batch, self.teacher, num_tokens=1, **self.loss_options)
        num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        self.num_tokens += num_tokens
        self.log("loss", total.detach() / max(num_tokens, 1), prog_bar=True, batch_size=num_tokens)
        if aux_loss is not None:
            self.log("aux_loss", aux_loss, batch_size=num_tokens)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning divided by the number of batches in a step, and DDP by the number of devices
        strategy = self.trainer.strategy
        everyones = float(strategy.reduce(torch.tensor(float(self.num_tokens), device=self.device), reduce_op="sum"))
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(everyones, 1)
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
        self.num_tokens = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)
