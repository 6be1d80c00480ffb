"""The whole loop on a tiny model: what a run leaves behind, what a step does, and what happens when it goes wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atesd.run import Run
from atesd.trainer import NonFiniteLoss, Trainer, train
from atesd_kernels.integrations.head import unwrap

ALWAYS_LOGGED = {
    "step", "loss", "learning_rate", "grad_norm", "alpha", "beta_a", "beta_b", "mismatch", "mismatch_p95",
    "top1_agreement", "student_entropy", "teacher_entropy", "student_confidence", "response_length",
    "truncated_fraction", "tokens_per_second", "probe_nll", "grounded_score", "seconds_rollout", "seconds_teacher",
    "seconds_student", "seconds_loss_backward", "seconds_optimizer", "seconds_probe", "seconds_step",
    "peak_memory_bytes", "num_tokens", "skipped", "end_of_turn_rate", "after_answer", "context_leakage",
}  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.run.student.trained.items()}


def test_a_run_leaves_everything_it_promises(tiny_config, tiny_model_path):
    config = tiny_config(max_steps=4)
    run_dir = train(config)
    rows = rows_of(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row) >= ALWAYS_LOGGED, ALWAYS_LOGGED - set(row)
        assert row["loss"] > 0 and row["grad_norm"] > 0 and 0 <= row["alpha"] <= 1
        assert row["num_tokens"] == pytest.approx(4 * row["response_length"])
    assert {"reward", "advantage", "policy_loss"} <= {name for row in rows for name in row}
    samples = rows_of(run_dir / "samples.jsonl")
    assert len(samples) == 4 and {"problem_id", "response", "exposed", "alpha"} <= set(samples[0])
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert "policy" in (run_dir / "report.html").read_text()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == asdict(config)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), run_dir / "adapter")
    moved = [p.abs().sum() for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(size > 0 for size in moved)
    modes = {path.name: path.stat().st_mode for path in run_dir.rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, "who may read the metrics may read the adapters, of checkpoints as well"


@pytest.mark.parametrize("teacher", ["frozen", "ema", "live"])
@pytest.mark.parametrize(("use_peft", "bf16"), [(True, False), (False, True)])
def test_every_teacher_trains_an_adapter_and_a_whole_model(tiny_config, teacher, use_peft, bf16):
    trainer = Trainer(
        Run.build(tiny_config(teacher=teacher, use_peft=use_peft, bf16=bf16, gradient_checkpointing=bf16))
    )
    frozen = {name: p.clone() for name, p in trainer.run.student.model.named_parameters() if not p.requires_grad}
    before = trained_weights(trainer)
    metrics, _ = trainer.train_step(0)
    assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.run.student.trained.items())
    for name, p in trainer.run.student.model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_accumulated_micro_batches_make_the_step_of_the_large_batch(tiny_config, tmp_path, aggregation):
    def one_step(size, accumulation):
        """Metrics, the gradient and the weights after one step of four problems, whose responses differ in length."""
        trainer = Trainer(Run.build(tiny_config(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / str(size)),
            loss_aggregation=aggregation, exposure_policy="fixed", fixed_alpha=0.5,
            max_grad_norm=1e6, temperature=2.0, top_p=1.0, top_k=0,
        )))  # fmt: skip
        generate, update, kept = trainer.run.rollout.engine.generate, trainer.update, {}
        trainer.run.rollout.engine.generate = lambda prompts: [
            replace(r, response_ids=r.response_ids[: 3 * i + 1]) for i, r in enumerate(generate(prompts))
        ]

        def update_keeping_gradients(loss):
            kept.update({name: p.grad.clone() for name, p in trainer.run.student.trained.items()})
            return update(loss)

        trainer.update = update_keeping_gradients
        metrics, _ = trainer.train_step(0)
        return metrics, kept, trained_weights(trainer)

    def difference(got, expected):
        a, b = (torch.cat([part[name].flatten().double() for name in expected]) for part in (got, expected))
        return float((a - b).norm() / b.norm())

    (expected, gradient, weights), *others = [one_step(*shape) for shape in ((4, 1), (2, 2), (1, 4))]
    for metrics, got_gradient, got_weights in others:
        for name in ("loss", "grad_norm", "mismatch", "student_entropy", "probe_nll"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
        assert metrics["num_tokens"] == expected["num_tokens"] == 1 + 4 + 7 + 10
        assert difference(got_gradient, gradient) < 1e-4
        assert difference(got_weights, weights) < 1e-4


def test_a_step_runs_one_forward_of_each_model_a_micro_batch_and_never_the_head(tiny_config):
    trainer = Trainer(Run.build(tiny_config(num_probe_problems=0, progress_signal="distill_loss", grounding="none")))
    calls = {"backbone": 0, "head": 0}
    base = unwrap(trainer.run.student.model)
    base.model.register_forward_hook(lambda *_: calls.update(backbone=calls["backbone"] + 1))
    base.lm_head.register_forward_hook(lambda *_: calls.update(head=calls["head"] + 1))
    problems = [trainer.run.data.problems.train[i] for i in trainer.run.rollout.sampler.draw(4)]
    rollouts = trainer.run.rollout.engine.generate([trainer.run.data.prompts.student(p) for p in problems])
    calls.update(backbone=0, head=0)
    trainer.distill(problems, rollouts, [1.0] * 4)
    assert calls == {"backbone": 2 * 2, "head": 0}


def test_the_exposure_reaches_the_teacher_and_only_the_teacher(tiny_config, monkeypatch):
    trainer = Trainer(Run.build(tiny_config(exposure_policy="fixed", fixed_alpha=0.67)))
    read = []
    build = trainer.run.data.prompts.teacher
    monkeypatch.setattr(trainer.run.data.prompts, "teacher", lambda *args: read.append(build(*args)) or read[-1])
    _, sample = trainer.train_step(0)
    for ids in read:
        text = trainer.run.tokenizer.decode(ids)
        assert "First she has" in text and "Then she has" in text and "She gives" in text.split("?")[0]
        assert text.count("She gives") == 1, "the third of three segments must stay hidden at alpha = 0.67"
    assert sample["exposed"].count("\n\n") == 2 and "First" not in trainer.run.tokenizer.decode(
        trainer.run.data.prompts.student(trainer.run.data.problems.train[0])
    )


def test_one_alpha_holds_for_a_window_and_the_next_is_another(tiny_config):
    trainer = Trainer(Run.build(tiny_config(hold_window=2, max_steps=4)))
    alphas = [trainer.train_step(t)[0]["alpha"] for t in range(4)]
    assert alphas[0] == alphas[1] != alphas[2] == alphas[3]


def test_the_probe_is_measured_when_due_before_the_update(tiny_config):
    trainer = Trainer(Run.build(tiny_config(probe_every=2, learning_rate=0.05)))
    with trainer.run.student.autocast():  # the same products, to the last bit
        untouched = trainer.run.exposure.meter.measure(0, [0.5] * 2, trainer.run.data.problems.train)["probe_nll"]
    first, second, third = (trainer.train_step(t)[0] for t in range(3))
    assert first["probe_nll"] == untouched
    assert "probe_nll" not in second
    assert third["probe_nll"] != untouched


def broken_objective(trainer, steps):
    """Make the loss NaN in the given steps (two micro-batches each)."""
    calls, objective = [0], trainer.run.objective

    def maybe_nan(*args):
        loss, stats = objective(*args)
        calls[0] += 1
        return (loss * float("nan") if (calls[0] - 1) // 2 in steps else loss), stats

    for name in ("needs_teacher", "needs_rollouts", "needs_reward"):
        setattr(maybe_nan, name, getattr(objective, name))
    trainer.run.objective = maybe_nan


def test_a_step_with_a_nan_loss_is_skipped_and_its_batch_kept(tiny_config):
    trainer = Trainer(Run.build(tiny_config()))
    broken_objective(trainer, {0})
    before = trained_weights(trainer)
    metrics, _ = trainer.train_step(0)
    assert metrics["skipped"] == 1 and metrics["grad_norm"] is None
    assert all(torch.equal(p, before[name]) for name, p in trainer.run.student.trained.items())
    kept = torch.load(trainer.run.run_dir / "nonfinite" / "step-1.pt")
    assert len(kept["rollouts"]) == 4 and kept["rollouts"][0]["response_ids"]
    metrics, _ = trainer.train_step(1)
    assert metrics["skipped"] == 0 and trainer.run.nonfinite_in_a_row == 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.run.student.trained.items())


def test_a_student_whose_logits_are_not_finite_skips_its_steps_and_the_run_stops_with_a_message(tiny_config):
    trainer = Trainer(Run.build(tiny_config(max_steps=6, max_nonfinite_steps=2, weight_decay=0.1)))
    with torch.no_grad():
        next(iter(trainer.run.student.trained.values())).fill_(torch.nan)
    before = trained_weights(trainer)
    with pytest.raises(NonFiniteLoss, match="2 steps in a row"):
        trainer.train()
    rows = rows_of(trainer.run.run_dir / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["loss"] is None
    kept = torch.load(trainer.run.run_dir / "nonfinite" / "step-2.pt")
    assert not any(r["finite"] for r in kept["rollouts"]) and len(kept["problem_ids"]) == 4
    assert all(torch.equal(p, before[name]) for name, p in list(trainer.run.student.trained.items())[1:])


def test_one_rollout_without_finite_logits_skips_the_step_though_its_loss_is_finite(tiny_config, monkeypatch):
    trainer = Trainer(Run.build(tiny_config()))
    generate = trainer.run.rollout.engine.generate
    monkeypatch.setattr(
        trainer.run.rollout.engine,
        "generate",
        lambda prompts: [replace(r, finite=i != 1) for i, r in enumerate(generate(prompts))],
    )
    before = trained_weights(trainer)
    assert trainer.train_step(0)[0]["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.run.student.trained.items())


@pytest.mark.filterwarnings("error:Detected call of")
def test_the_schedule_follows_the_count_of_steps_skipped_ones_included(tiny_config):
    trainer = Trainer(Run.build(tiny_config(max_steps=4, lr_scheduler_type="linear", learning_rate=1e-3)))
    broken_objective(trainer, {0, 2})
    rates = [trainer.train_step(t)[0]["learning_rate"] for t in range(4)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_the_run_stops_after_several_non_finite_steps_in_a_row(tiny_config):
    trainer = Trainer(Run.build(tiny_config(max_steps=6, max_nonfinite_steps=2)))
    broken_objective(trainer, {0, 2, 3})
    with pytest.raises(NonFiniteLoss, match="2 steps in a row"):
        trainer.train()
    rows = rows_of(trainer.run.run_dir / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 0, 1, 1]
    assert rows[0]["loss"] is None


def test_a_prompt_too_long_for_the_model_is_refused_by_name_before_training(tiny_config):
    with pytest.raises(ValueError, match="student prompt of problem"):
        Trainer(Run.build(tiny_config(max_prompt_length=8)))
