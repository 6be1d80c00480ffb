"""The same few steps by a plain loop, by the Hugging Face Trainer and by Lightning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from atesd_kernels import divergence
from atesd_kernels.integrations.pairs import collate, pair_divergence

from .trainer_rank import ROWS, by_one_process

README = Path(__file__).parents[2] / "atesd_kernels" / "README.md"
LEARNING_RATE, STEPS = 1e-2, 3


@pytest.fixture
def model(sharp_model_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(sharp_model_path), config)


def trained(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def expected(model):
    """A plain PyTorch loop over the whole batch."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = pair_divergence(model, collate(ROWS), temperature=1.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = trained(model)
    model.load_state_dict(state)
    assert losses[-1] < losses[0]
    return losses, after


def test_the_loss_is_the_divergence_of_the_two_models_at_the_response(model):
    total = tokens = 0
    for row in ROWS:
        n = len(row["response_ids"])
        with torch.no_grad():
            student = model(input_ids=torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0, -n - 1 : -1]
            ids = torch.tensor([row["teacher_prompt_ids"] + row["response_ids"]])
            with model.disable_adapter():
                teacher = model(input_ids=ids).logits[0, -n - 1 : -1]
        total += divergence(student, teacher, reduction="sum", temperature=1.1).item()
        tokens += n
    assert pair_divergence(model, collate(ROWS), temperature=1.1).item() == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: torch.compile(nn.DataParallel(m))], ids=["compile", "both"])
def test_the_adapters_to_switch_off_are_found_under_wrappers(model, wrap):
    expected = pair_divergence(model, collate(ROWS)).item()
    assert pair_divergence(wrap(model), collate(ROWS)).item() == pytest.approx(expected, rel=1e-5)


def test_another_model_may_be_the_teacher_and_a_missing_one_is_refused(model, sharp_model_path):
    other = AutoModelForCausalLM.from_pretrained(sharp_model_path)
    mine = pair_divergence(model, collate(ROWS))
    assert pair_divergence(model, collate(ROWS), other).item() == pytest.approx(mine.item(), rel=1e-4)
    with pytest.raises(ValueError, match="pass a frozen copy"):
        pair_divergence(other, collate(ROWS))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_hugging_face_trainer_follows_the_plain_loop(model, expected, accumulation, tmp_path):
    from atesd_kernels.integrations.hf_trainer import SelfDistillationTrainer

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4 // accumulation, max_steps=STEPS, use_cpu=True,
        gradient_accumulation_steps=accumulation, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        weight_decay=1e-2, max_grad_norm=0.0, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = SelfDistillationTrainer(model, arguments, train_dataset=ROWS, loss_options={"temperature": 1.1})
    trainer.train()
    losses, after = expected
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(trained(model), after, rtol=1e-2, atol=1e-4)


def lightning(model, tmp_path, rows_a_batch, gradients=None, rows=ROWS, **options):
    """Three steps, each on four rows; notes the gradients the optimizer gets."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    from atesd_kernels.integrations.lightning import SelfDistillationModule

    class Noted(SelfDistillationModule):
        def optimizer_step(self, epoch, batch, optimizer, closure):
            super().optimizer_step(epoch, batch, optimizer, closure)
            if gradients is not None:
                gradients.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    module = Noted(model, learning_rate=LEARNING_RATE, loss_options={"temperature": 1.1})
    data = torch.utils.data.DataLoader(rows, batch_size=rows_a_batch, collate_fn=collate)
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), accumulate_grad_batches=4 // rows_a_batch,
        **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trained(model)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_lightning_follows_the_plain_loop(model, expected, accumulation, tmp_path):
    after = lightning(model, tmp_path, 4 // accumulation)
    torch.testing.assert_close(after, expected[1], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_batches_lightning_accumulates_make_the_gradient_of_the_large_one_before_it_is_clipped(model, tmp_path, clip):
    state, gradients = {k: v.clone() for k, v in model.state_dict().items()}, {}
    for rows_a_batch in (4, 2, 1):
        model.load_state_dict(state)
        seen = gradients[rows_a_batch] = []
        lightning(model, tmp_path, rows_a_batch, seen, gradient_clip_val=clip)
    for rows_a_batch in (2, 1):
        torch.testing.assert_close(gradients[rows_a_batch][0], gradients[4][0], rtol=1e-4, atol=1e-7)
    if clip:
        assert gradients[4][0].norm() == pytest.approx(clip, rel=1e-3)


def test_the_fewer_batches_at_an_epoch_s_end_make_a_whole_step_too(model, tmp_path):
    state, gradients = {k: v.clone() for k, v in model.state_dict().items()}, {}
    for rows_a_batch in (4, 2):  # steps on four rows, on two, and, in the second epoch, on four
        model.load_state_dict(state)
        lightning(model, tmp_path, rows_a_batch, gradients.setdefault(rows_a_batch, []), rows=ROWS + ROWS[2:])
    for accumulated, whole in zip(gradients[2], gradients[4], strict=True):
        # Adam's first steps divide rounding by itself
        assert (accumulated - whole).norm() <= 1e-3 * whole.norm()


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(sharp_model_path, tmp_path):
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.integrations.trainer_rank", str(sharp_model_path), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    expected = by_one_process(sharp_model_path)
    for rank in range(2):
        for trainer, got in torch.load(tmp_path / f"{rank}.pt").items():
            assert (got - expected).norm() <= 1e-5 * expected.norm(), trainer


def test_gradient_checkpointing_of_the_backbone_changes_nothing(model):
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        pair_divergence(model, collate(ROWS)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    torch.testing.assert_close(*gradients)


BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
BLOCKS = [block for block in BLOCKS if "integrations" in block and "verl" not in block]  # that one: test_verl


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[-1][:30] for block in BLOCKS])
def test_the_readmes_blocks_run(block, model, sharp_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is started
    if "lightning" in block:
        pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    names = {"model": model, "rows": ROWS, "ids": torch.tensor([[5, 6, 7]])}
    names["optimizer"] = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    names["args"] = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
    if "use_exposure" in block:
        pytest.importorskip("trl", reason="trl is not installed")
        from .trl_trainers import make_trainer

        names["trainer"] = make_trainer("sdft", sharp_model_path, tmp_path, lora=True, max_steps=1)
    before = trained(model).clone()
    exec(block, names)
    if "rows" in block:
        assert not trained(model).equal(before)


def test_the_readme_has_these_blocks():
    assert len(BLOCKS) == 5
