"""A LightningModule whose loss is a divergence; batches are those of `pairs.collate`.

module = SelfDistillationModule(model, learning_rate=5e-6, loss_options={"entry_clip": 0.05})
Trainer(max_steps=100).fit(module, DataLoader(rows, batch_size=4, collate_fn=collate))
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from .pairs import pair_divergence


class SelfDistillationModule(LightningModule):
    """Distils `teacher` (None: the model without its peft adapters) into `model`, with AdamW on what is trained."""

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

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = pair_divergence(self.model, batch, self.teacher, **self.loss_options)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)
