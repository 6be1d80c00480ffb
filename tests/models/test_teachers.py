"""The three teachers, with LoRA and without: whose weights they run, and what a checkpoint keeps of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import hidden_rows, pack
from atesd.models.teachers import Teacher

BATCH = pack([[5, 6, 7], [8, 9]], [[20, 21], [22, 23, 24]], "cpu")


@pytest.fixture(params=["lora", "full"])
def model(request, tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    use_packed_attention(model)
    if request.param == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def student_hidden(model):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.no_grad():
        return hidden_rows(base.model, BATCH)


def train_a_little(model):
    """Every trained weight moves."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def test_a_frozen_teacher_stays_where_the_student_began(model):
    start, teacher = student_hidden(model), Teacher(model, "frozen")
    train_a_little(model)
    teacher.update()
    assert torch.equal(teacher.hidden(BATCH), start)
    assert not torch.allclose(student_hidden(model), start, atol=1e-3)
    assert not teacher.hidden(BATCH).requires_grad


def test_the_teacher_keeps_its_own_head_where_the_head_is_trained(model):
    teacher = Teacher(model, "frozen")
    head = teacher.head.weight.clone()
    train_a_little(model)
    assert torch.equal(teacher.head.weight, head)
    tuned_fully = not hasattr(model, "peft_config")
    assert teacher.shares_head is not tuned_fully
    assert torch.equal(teacher.student_head.weight, head) is not tuned_fully


def test_a_live_teacher_is_the_student_without_gradient(model):
    teacher = Teacher(model, "live")
    train_a_little(model)
    assert torch.equal(teacher.hidden(BATCH), student_hidden(model))
    assert teacher.shares_head and not teacher.hidden(BATCH).requires_grad


def test_an_ema_teacher_is_the_average_its_formula_says(model):
    teacher = Teacher(model, "ema", ema_decay=0.75)
    before = {name: value.clone() for name, value in teacher.values.items()}
    train_a_little(model)
    teacher.update()
    assert before
    for name, value in teacher.values.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * teacher.sources[name].detach())


def test_an_ema_teacher_runs_with_its_averages(model):
    start, teacher = student_hidden(model), Teacher(model, "ema", ema_decay=1.0)
    train_a_little(model)
    teacher.update()  # decay 1: nothing of the student reaches it
    torch.testing.assert_close(teacher.hidden(BATCH), start)
    teacher.decay = 0.0
    teacher.update()
    torch.testing.assert_close(teacher.hidden(BATCH), student_hidden(model))


def test_a_checkpoint_of_an_ema_teacher_brings_its_averages_back(model):
    teacher = Teacher(model, "ema", ema_decay=0.5)
    train_a_little(model)
    teacher.update()
    expected = teacher.hidden(BATCH)
    fresh = Teacher(model, "ema", ema_decay=0.5)
    assert not torch.equal(fresh.hidden(BATCH), expected)
    fresh.load_state_dict(teacher.state_dict())
    assert torch.equal(fresh.hidden(BATCH), expected)


def test_a_checkpoint_of_another_kind_is_refused(model):
    with pytest.raises(ValueError, match="teacher='live'"):
        Teacher(model, "ema").load_state_dict(Teacher(model, "live").state_dict())
    with pytest.raises(ValueError, match="'golden'"):
        Teacher(model, "golden")


def test_a_frozen_bf16_copy_gives_the_autocast_student_to_the_last_bit(model):
    with torch.autocast("cpu", torch.bfloat16):
        start = student_hidden(model)
        assert torch.equal(Teacher(model, "frozen", bf16=True).hidden(BATCH), start)
    teacher = Teacher(model, "frozen", bf16=True)
    if teacher.values:
        assert any(value.dtype == torch.bfloat16 for value in teacher.values.values())


def test_the_teacher_ignores_dropout_and_leaves_the_student_in_training(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attention_dropout=0.5).train()
    use_packed_attention(model)
    teacher = Teacher(model, "frozen")
    assert torch.equal(teacher.hidden(BATCH), teacher.hidden(BATCH))
    assert model.training
