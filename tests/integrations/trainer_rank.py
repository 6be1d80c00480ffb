"""One of the processes of `test_two_processes_make_the_step_of_one`: one step, its rows being half of the batch's.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.integrations.trainer_rank MODEL FOLDER

Separate because Lightning and the Hugging Face Trainer start their process groups themselves, once a process each.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, TrainingArguments

from atesd_kernels.integrations.pairs import collate, pair_divergence

# of unequal lengths: of one process's tokens, and of all
ROWS = [
    {"prompt_ids": [5, 6], "teacher_prompt_ids": [5, 6, 7, 8, 9], "response_ids": [11, 12, 13]},
    {"prompt_ids": [15, 6, 3], "teacher_prompt_ids": [15, 6, 3, 40], "response_ids": [21, 22]},
    {"prompt_ids": [9], "teacher_prompt_ids": [9, 33, 34], "response_ids": [31, 32, 33, 34, 35]},
    {"prompt_ids": [4, 4, 4, 4], "teacher_prompt_ids": [4, 4], "response_ids": [41]},
]


def pair(path: str):
    """The model and a frozen teacher, which differs a little."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.1)
    return model, teacher.requires_grad_(False)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_one_process(path: str) -> torch.Tensor:
    model, teacher = pair(path)
    pair_divergence(model, collate(ROWS), teacher).backward()
    return gradient(model)


def by_lightning(path: str, folder: str) -> torch.Tensor:
    from pytorch_lightning import Trainer

    from atesd_kernels.integrations.lightning import SelfDistillationModule

    seen = []

    class Noted(SelfDistillationModule):
        def optimizer_step(self, epoch, batch, optimizer, closure):
            super().optimizer_step(epoch, batch, optimizer, closure)
            seen.append(gradient(self.model))

    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy="ddp", accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Noted(*pair(path)), torch.utils.data.DataLoader(ROWS, batch_size=1, collate_fn=collate))
    return seen[0]


def by_the_hugging_face_trainer(path: str, folder: str) -> torch.Tensor:
    from transformers import TrainerCallback

    from atesd_kernels.integrations.hf_trainer import SelfDistillationTrainer

    seen = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            seen.append(gradient(model))

    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, use_cpu=True,
        ddp_backend="gloo", max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model, teacher = pair(path)
    SelfDistillationTrainer(model, arguments, train_dataset=ROWS, teacher=teacher, callbacks=[Note()]).train()
    return seen[0]


if __name__ == "__main__":
    path, folder = sys.argv[1:]
    got = {f.__name__: f(path, folder) for f in (by_lightning, by_the_hugging_face_trainer)}
    assert dist.get_world_size() == 2
    torch.save(got, f"{folder}/{os.environ['RANK']}.pt")
