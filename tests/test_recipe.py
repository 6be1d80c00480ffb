"""The recipe in the loop: OPSD's loss to rounding, every objective, per-example exposure, guards, a step's cost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from atesd.data.problems import Problem
from atesd.errors import ConfigError
from atesd.evaluation.reward import VerifierReward
from atesd.exposure.difficulty import Difficulty
from atesd.guards import Guards
from atesd.objectives import make_objective
from atesd.rollout import Rollout
from atesd.run import Run
from atesd.step_metrics import repetition, text_metrics
from atesd.trainer import Trainer, train
from atesd_kernels.integrations.head import unwrap
from tests.quiet import quietly


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch_of(trainer):
    problems = [trainer.run.data.problems.train[i] for i in trainer.run.rollout.sampler.draw(4)]
    return problems, trainer.run.rollout.engine.generate([trainer.run.data.prompts.student(p) for p in problems])


def chat(trainer, content, thinking):
    messages = [{"role": "user", "content": content}]
    text = trainer.run.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return trainer.run.tokenizer(text, add_special_tokens=False)["input_ids"]


def dense_opsd(trainer, problems, rollouts):
    """OPSD from the problem's text on, written out: whole solution in the teacher's prompt, base weights without the
    adapter, dense logits, entry-clipped forward KL at T = 1.1, mean over all response tokens."""
    config, templates = trainer.run.config, trainer.run.data.prompts.templates
    total, count = 0.0, 0
    for problem, rollout in zip(problems, rollouts, strict=True):
        asked = templates.student.replace("{problem}", problem.problem)
        read = templates.teacher.replace("{transition}", templates.transition)
        read = read.replace("{problem}", problem.problem).replace("{reference}", problem.solution)
        response, T = rollout.response_ids, config.scoring_temperature
        student_ids, teacher_ids = chat(trainer, asked, False) + response, chat(trainer, read, True) + response
        s = trainer.run.student.model(torch.tensor([student_ids])).logits[0, -len(response) - 1 : -1] / T
        with torch.no_grad(), trainer.run.student.model.disable_adapter():
            t = trainer.run.student.model(torch.tensor([teacher_ids])).logits[0, -len(response) - 1 : -1] / T
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).clamp(max=config.entry_clip).sum()
        count += len(response)
    return total / count


def move_adapter(trainer):
    """Weights at which student and frozen teacher really differ, in float64 (the model's norms stay in float32)."""
    torch.manual_seed(1)
    trainer.run.student.model.double()
    with torch.no_grad():
        for name, p in unwrap(trainer.run.student.model).named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)


def test_full_exposure_with_a_frozen_teacher_is_opsd_to_rounding(tiny_config):
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(exposure_policy="full", entry_clip=0.01))))
    problems, rollouts = batch_of(trainer)
    move_adapter(trainer)
    loss, _, _ = trainer.distill(problems, rollouts, [1.0] * 4)
    got = {name: p.grad.clone() for name, p in trainer.run.student.trained.items()}
    trainer.run.student.model.zero_grad()
    expected = dense_opsd(trainer, problems, rollouts)
    expected.backward()
    assert abs(expected.item()) > 1e-4
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    size = sum(p.grad.square().sum() for p in trainer.run.student.trained.values())
    assert size > 1e-8
    error = sum((got[name] - p.grad).square().sum() for name, p in trainer.run.student.trained.items())
    assert float((error / size).sqrt()) < 1e-5
    other, _, _ = trainer.distill(problems, rollouts, [0.0] * 4)
    assert other != pytest.approx(loss, rel=1e-3), "the check must be able to fail"


def test_no_exposure_shows_the_teacher_the_answer_and_nothing_else_of_the_reference(tiny_config, monkeypatch):
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(exposure_policy="fixed", fixed_alpha=0.0))))
    read, build = [], trainer.run.data.prompts.teacher
    monkeypatch.setattr(trainer.run.data.prompts, "teacher", lambda *args: read.append(build(*args)) or read[-1])
    trainer.train_step(0)
    for ids in read:
        text = trainer.run.tokenizer.decode(ids)
        assert "The final answer to this problem is: " in text
        assert not any(shown in text for shown in ("First she has", "Then she has", "####", "reference"))


@pytest.mark.parametrize("objective", ["sft", "grpo", "distill+grpo", "distill+sft", "policy_gradient"])
def test_every_objective_trains(tiny_config, objective, monkeypatch):
    pytest.importorskip("math_verify")
    # a random model solves nothing: every second response counts as right
    monkeypatch.setattr(
        VerifierReward, "rewards", lambda self, problems, rollouts: [i % 2.0 for i in range(len(rollouts))]
    )
    taught = objective in ("distill+grpo", "distill+sft", "policy_gradient")
    policy = "atesd" if taught else "full"
    config = tiny_config(objective=objective, num_generations=2, exposure_policy=policy, max_steps=2)
    rows = rows_of(quietly(lambda: train(config)) / "metrics.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        assert ("mismatch" in row) == taught
        assert row.get("verifier_reward") == (0.5 if "grpo" in objective else None)
        assert row["student_entropy"] > 0
    if objective == "sft":
        assert "seconds_rollout" not in rows[0] and rows[0]["response_length"] > 12


def test_what_the_policy_hears_of_a_step_with_groups_and_a_reward_is_of_distinct_problems_and_the_teacher_alone(
    tiny_config, monkeypatch
):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(VerifierReward, "advantages", lambda self, problems, rollouts: ([1.0] * len(rollouts), {}))
    settings = {"objective": "distill+grpo", "num_generations": 2, "reward_weight": 50.0, "entry_clip": None}
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(**settings))))
    scored, heard = [], {}
    grounded, observe = trainer.run.exposure.meter.grounded, trainer.run.exposure.policy.observe
    trainer.run.exposure.meter.grounded = lambda alphas, problems: scored.extend(problems) or grounded(alphas, problems)
    trainer.run.exposure.policy.observe = lambda t, **measured: heard.update(measured) or observe(t, **measured)
    metrics, _ = trainer.train_step(0)
    assert len({problem.id for problem in scored}) == len(scored) == 2
    assert heard["loss"] == heard["mismatch"] == metrics["mismatch"]
    assert metrics["loss"] == pytest.approx(metrics["mismatch"] - 50), "the reward is in the loss"


def test_sft_learns_the_references(tiny_config):
    config = tiny_config(objective="sft", exposure_policy="full", use_peft=False, learning_rate=3e-3, max_steps=6,
                         max_grad_norm=1.0, entry_clip=None)  # fmt: skip
    rows = rows_of(quietly(lambda: train(config)) / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["probe_nll"] < rows[0]["probe_nll"] - 0.1


def test_the_verifier_rewards_right_answers_only(tiny_config):
    pytest.importorskip("math_verify")
    trainer = quietly(lambda: Trainer(Run.build(tiny_config())))
    problem = trainer.run.data.problems.train[0]

    def rollout(text, truncated=False):
        return Rollout([1], trainer.run.tokenizer(text, add_special_tokens=False)["input_ids"], truncated)

    texts = [f"so \\boxed{{{problem.answer}}}", "so \\boxed{-1}", "no answer", f"\\boxed{{{problem.answer}.0}}"]
    reward = VerifierReward(trainer.run.tokenizer, num_generations=4, box_only=False)
    advantages, metrics = reward.advantages([problem] * 4, [rollout(text) for text in texts])
    assert metrics == {"verifier_reward": 0.5, "groups_without_signal": 0.0}
    assert advantages[0] == advantages[3] > 0 > advantages[1] == advantages[2]
    working = f"so there are {problem.answer}"  # which ends in the answer, by the author's will or at the cut
    ended_or_cut = [rollout(working), rollout(working, truncated=True)]
    assert reward.rewards([problem] * 2, ended_or_cut) == [1.0, 0.0]
    reward.grader.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft"}, "has no teacher, so exposure_policy 'atesd' has nothing to choose"),
        ({"objective": "grpo", "exposure_policy": "full"}, "num_generations is 1; it must be at least 2"),
        ({"per_example_exposure": True, "exposure_policy": "full"}, "gives every problem the same exposure"),
        (
            {"save_best": True, "num_probe_problems": 0, "progress_signal": "distill_loss"},
            "save_best goes by the probe",
        ),
        ({"early_stopping_patience": -1}, "early_stopping_patience is -1"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(tiny_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**settings).validate()


def test_per_example_exposure_gives_each_problem_its_own_alpha_and_resumes(tiny_config, tmp_path, monkeypatch):
    settings = {"per_example_exposure": True, "num_generations": 2, "max_steps": 4, "save_steps": 2}
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(**settings))))
    seen, distill = [], trainer.distill
    trainer.distill = lambda *args: seen.append(args[2]) or distill(*args)
    metrics, _ = trainer.train_step(0)
    assert len(seen[0]) == 8 and seen[0][0::2] == seen[0][1::2], "responses of one problem share an exposure"
    assert len(set(seen[0])) == 4
    assert metrics["alpha"] == pytest.approx(sum(seen[0]) / 8)

    whole = quietly(lambda: train(tiny_config(**settings, output_dir=str(tmp_path / "whole"))))
    step = Trainer.train_step

    def dies_in_the_third(self, t):
        if t == 2:
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        quietly(lambda: train(tiny_config(**settings, output_dir=str(tmp_path / "cut"))))
    monkeypatch.undo()
    resumed = tiny_config(**settings, output_dir=str(tmp_path / "cut"), resume=str(tmp_path / "cut"))
    cut = quietly(lambda: train(resumed))
    for a, b in zip(rows_of(whole / "metrics.jsonl"), rows_of(cut / "metrics.jsonl"), strict=True):
        assert (a["loss"], a["alpha"], a["student_entropy"]) == (b["loss"], b["alpha"], b["student_entropy"])


def test_difficulty_is_centred_on_the_problems_seen_so_far_and_harder_is_larger():
    difficulty = Difficulty()
    first = difficulty.normalise([1.0, 3.0])
    assert first == pytest.approx([-1.0, 1.0])
    second = difficulty.normalise([5.0, float("nan")])
    assert second[0] == pytest.approx(2 / (8 / 3) ** 0.5) and second[1] == 0.0  # (5 - 3) / std of 1, 3, 5
    assert Difficulty().normalise([2.0]) == [0.0]


def guards_of(tiny_config, tmp_path, **settings):
    return Guards(tiny_config(**settings), tmp_path)


def test_early_stopping_waits_for_its_patience_and_no_longer(tiny_config, tmp_path):
    guards = guards_of(tiny_config, tmp_path, early_stopping_patience=2)
    for t, nll in enumerate([3.0, None, 2.5, 2.6, float("nan"), 2.4, 2.4]):
        assert not guards.before_update(t, nll), "save_best is off"
        assert guards.stop_reason is None
    guards.before_update(7, 2.5)
    assert "not fallen below 2.4 (step 5) in 2 measurements" in guards.stop_reason
    assert guards.summary()["best_probe_nll"] == 2.4


@pytest.mark.parametrize(
    ("healthy", "sick", "told"),
    [
        ({"student_entropy": 1.0}, {"student_entropy": 0.05}, "student_entropy is below 0.1 times its start"),
        ({"student_entropy": 1.0}, {"student_entropy": 6.0}, "student_entropy is above 5 times its start"),
        ({"response_length": 90}, {"response_length": 3}, "response_length is below"),
        ({"repetition": 0.1}, {"repetition": 0.7}, "4-grams repeat"),
        ({"clip_fraction": 0.0}, {"clip_fraction": 0.6}, "clip_fraction is more than 0.5 above its start"),
        ({"context_leakage": 0.0}, {"context_leakage": 0.3}, "context_leakage is more than 0.25 above its start"),
        ({"after_answer": 0.1}, {"after_answer": 0.7}, "after_answer is more than 0.5 above its start"),
        ({"end_of_turn_rate": 0.9}, {"end_of_turn_rate": 0.3}, "end_of_turn_rate is more than 0.5 below its start"),
        ({"clip_fraction": 0.9}, {"clip_fraction": 1.5}, "clip_fraction is more than 0.5 above its start"),
    ],
)
def test_a_collapse_is_told_once_and_stops_the_run_only_on_request(tiny_config, tmp_path, capsys, healthy, sick, told):
    for stop in (False, True):
        guards = guards_of(tiny_config, tmp_path, stop_on_collapse=stop)
        for step in range(8):
            guards.after_step(step, healthy)
        guards.after_step(8, sick)
        guards.after_step(9, healthy)
        for step in range(10, 12):
            guards.after_step(step, sick)
        assert guards.stop_reason is None and told not in capsys.readouterr().out
        for step in range(12, 16):
            guards.after_step(step, sick)
        assert capsys.readouterr().out.count(told) == 1
        assert (guards.stop_reason is not None) == stop


def test_the_texts_of_a_step_tell_how_they_ended_and_what_they_spoke_of(tiny_config):
    run = Run.build(tiny_config())
    ids = [
        run.tokenizer(text).input_ids for text in ("so \\boxed{7}", "\\boxed{7} and so on, 12345", "I do not copy it")
    ]
    prompt = run.tokenizer("What is 3 + 4?").input_ids
    rollouts = [Rollout(prompt, reply, truncated=i == 1) for i, reply in enumerate(ids)]
    problems = [Problem(str(i), "What is 3 + 4?", "It is 7.", "7") for i in range(3)]
    found = text_metrics(run.tokenizer, run.wording, problems, rollouts)
    assert found["end_of_turn_rate"] == pytest.approx(2 / 3)
    assert found["context_leakage"] == pytest.approx(1 / 3)
    assert found["after_answer"] == pytest.approx(len("and so on, 12345") / len("\\boxed{7} and so on, 12345") / 3)
    run.close()


def test_repetition_counts_what_was_said_before():
    assert repetition([]) == repetition([1, 2]) == repetition(list(range(50))) == 0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repetition([5] * 100) > 0.98


def test_a_run_stops_early_keeps_its_best_adapter_and_says_why(tiny_config):
    config = tiny_config(max_steps=12, early_stopping_patience=2, save_best=True, learning_rate=0.3, max_grad_norm=1e6)
    run_dir = quietly(lambda: train(config))
    rows, summary = rows_of(run_dir / "metrics.jsonl"), json.loads((run_dir / "summary.json").read_text())
    assert len(rows) == summary["steps"] < 12 and "early_stopping_patience" in summary["stopped"]
    best = min(rows, key=lambda row: row["probe_nll"])
    assert summary["best_probe_nll"] == best["probe_nll"] and summary["best_step"] == best["step"] - 1
    assert json.loads((run_dir / "best" / "best.json").read_text())["step"] == summary["best_step"]
    assert (run_dir / "checkpoints" / f"step-{summary['steps']:06d}").is_dir()
    # the adapter kept is the one that was measured
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(output_dir=str(run_dir.parent / "again")))))
    trainer.run.student.model.load_adapter(str(run_dir / "best" / "adapter"), "best", is_trainable=False)
    trainer.run.student.model.set_adapter("best")
    assert trainer.run.exposure.meter.measure(0, [0.5] * 2, trainer.run.data.problems.train)[
        "probe_nll"
    ] == pytest.approx(best["probe_nll"], rel=1e-5)


def test_the_best_whole_model_loads_by_itself(tiny_config):
    run_dir = quietly(lambda: train(tiny_config(use_peft=False, save_best=True, max_steps=1)))
    best = quietly(lambda: Trainer(Run.build(tiny_config(model_name_or_path=str(run_dir / "best" / "model"),
                                                      output_dir=str(run_dir.parent / "loaded")))))  # fmt: skip
    assert best.run.tokenizer.chat_template


def test_the_clip_fraction_is_the_share_of_the_divergence_the_clip_takes(tiny_config, tmp_path):
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(entry_clip=1e-5))))
    metrics, _ = trainer.train_step(0)
    assert metrics["clip_fraction"] == pytest.approx(1 - metrics["loss"] / metrics["mismatch"]) and metrics["loss"] > -1
    assert metrics["clip_fraction"] > 0.01
    trainer = quietly(
        lambda: Trainer(Run.build(tiny_config(entry_clip=None, token_clip=1e-9, output_dir=str(tmp_path / "b"))))
    )
    assert trainer.train_step(0)[0]["clip_fraction"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("grounding", "expected"), [("none", [5, 4]), ("reference", [6, 5])])
def test_the_signals_need_no_forward_beyond_student_teacher_and_a_due_probe(tiny_config, grounding, expected):
    """Two micro-batches: two forwards of each model; a due probe adds its own, the grounded score one of the teacher.
    Rows are packed: no forward sees a padding token."""
    config = tiny_config(probe_every=2, grounding=grounding, exposure_policy="full")
    trainer = quietly(lambda: Trainer(Run.build(config)))
    widths = []
    base = unwrap(trainer.run.student.model)
    base.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    generate = trainer.run.rollout.engine.generate
    rollouts = []
    trainer.run.rollout.engine.generate = lambda prompts: (
        rollouts.extend(out := generate(prompts)) or widths.clear() or out
    )
    forwards = []
    for t in range(2):
        rollouts.clear()
        problems = trainer.run.rollout.problems_of(trainer.run.rollout.sampler.peek)
        trainer.train_step(t)
        forwards.append(len(widths))
        if t == 1:
            student = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
            assert sum(widths[-3::2]) == student, "the student's rows hold prompts and responses, and nothing else"
            read = [trainer.run.data.prompts.teacher(p, trainer.run.data.references[p.id], 1.0) for p in problems]
            teacher = sum(map(len, read)) + sum(len(r.response_ids) for r in rollouts)
            assert sum(widths[-4::2]) == teacher, "nor do the teacher's"
    assert forwards == expected


def test_nothing_vocabulary_sized_is_allocated_outside_the_loss_chunk(tiny_config, tmp_path, tiny_model_path):
    """Every allocation of a step but sampling is watched, for each objective: of those with a vocabulary's length among
    their dimensions, what lives at the same time fits into `chunk_bytes`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocab, chunk = 20_011, 400_000  # a prime: nothing else has a size it divides
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "wide")
    config = tiny_config(model_name_or_path=str(tmp_path / "wide"), chunk_bytes=chunk, max_completion_length=40,
                         exposure_policy="full", importance_clip=2.0)  # fmt: skip
    trainer = quietly(lambda: Trainer(Run.build(config)))
    problems, rollouts = batch_of(trainer)
    rollouts = [replace(r, logprobs=[-9.0] * len(r.response_ids)) for r in rollouts]  # as from an engine of its own
    assert chunk < 4 * vocab * sum(len(r.response_ids) for r in rollouts[:2]) / 4
    for objective in ("distill", "sft", "grpo", "distill+grpo"):
        trainer.run.objective = make_objective(replace(config, objective=objective))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            trainer.run.exposure.meter.measure(0, [1.0] * 4, problems)
            trainer.distill(problems, rollouts, [1.0] * 4, [1.0, -1.0, 0.5, -0.5])
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.nbytes() % vocab == 0]
        assert 0 < max(accumulate(changes)) <= chunk, objective


def test_imitation_beside_the_distillation_has_its_own_weight_and_denominator(tiny_config, tmp_path):
    """Loss and gradient are the distillation's plus the weight times those of SFT on the step's references."""

    def of_step(name, micro_batch=4, **changes):
        batch = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
        config = tiny_config(exposure_policy="full", output_dir=str(tmp_path / name), **batch, **changes)
        trainer = quietly(lambda: Trainer(Run.build(config)))
        problems, rollouts = trainer.roll_out(0)
        loss, totals, _ = trainer.distill(problems, rollouts, [1.0] * 4)
        gradient = torch.cat([p.grad.flatten() for p in trainer.run.student.trained.values()])
        trainer.run.close()
        return loss, totals, gradient

    plain, _, of_teacher = of_step("distill")
    nll, _, of_references = of_step("sft", objective="sft")
    for name, micro_batch in (("whole", 4), ("parts", 1)):
        loss, totals, gradient = of_step(name, micro_batch, objective="distill+sft", sft_weight=0.3)
        assert loss == pytest.approx(plain + 0.3 * nll, rel=1e-5)
        assert totals.imitation_loss() == pytest.approx(0.3 * nll, rel=1e-5)
        assert totals.objective(loss) == pytest.approx(plain, abs=1e-5 * loss)  # what the policy hears
        expected = of_teacher + 0.3 * of_references
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
