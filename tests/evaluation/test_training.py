"""Evaluation during training: it is recorded, and it changes nothing."""

from __future__ import annotations

import psutil
import pytest
import torch

from atesd import run_parts
from atesd.config import load_config
from atesd.data.prompts import PromptTooLong
from atesd.data.run_data import load_run_data
from atesd.errors import ConfigError, MissingPackageError
from atesd.evaluation.grading.grader import Grader
from atesd.models.loading import context_length, load_model_config, load_tokenizer
from atesd.rollout import RolloutError
from atesd.rollout.hf import HFEngine
from atesd.run import Run
from atesd.trainer import Trainer, train
from tests.run_logs import rows_of

pytest.importorskip("math_verify", reason="grading needs math-verify")

EVALUATED = {"num_eval_problems": 3, "num_train_problems": 9, "eval_k": 2, "eval_max_completion_length": 9}


def of_training(row):
    depends_on_the_machine = ("seconds_", "tokens_per_second", "peak_memory_bytes")
    return {name: v for name, v in row.items() if not name.startswith(("eval_", *depends_on_the_machine))}


def test_a_run_with_evaluations_trains_exactly_as_one_without(tiny_config, tmp_path):
    shared = {"max_steps": 3, "lora_dropout": 0.1, "teacher": "ema", **EVALUATED}
    plain = train(tiny_config(**shared, output_dir=str(tmp_path / "plain")))
    evaluated = train(tiny_config(**shared, eval_steps=2, output_dir=str(tmp_path / "evaluated")))
    rows = rows_of(evaluated)
    assert [row["step"] for row in rows if "eval_average" in row] == [0, 2, 3]
    assert list(map(of_training, rows[1:])) == list(map(of_training, rows_of(plain)))
    weights = "adapter/adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (evaluated / weights).read_bytes()
    for row in rows:
        if "eval_average" in row:
            assert 0 <= row["eval_average_low"] <= row["eval_average"] <= row["eval_average_high"] <= 1
            assert 0 < row["eval_response_length"] <= 9 and row["seconds_eval"] > 0
    assert 'alt="Evaluation"' in (evaluated / "report.html").read_text()
    assert 'alt="Evaluation"' not in (plain / "report.html").read_text()


def test_a_resumed_run_has_the_evaluations_of_the_whole_one(tiny_config, tmp_path):
    settings = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "eval_on_start": False, **EVALUATED}
    whole = train(tiny_config(**settings, output_dir=str(tmp_path / "whole")))
    broken = train(tiny_config(**{**settings, "max_steps": 1}, output_dir=str(tmp_path / "broken")))
    train(load_config(None, ["--resume", str(broken), "--max_steps", "2"]))
    evaluations = [
        [{k: v for k, v in row.items() if k.startswith(("eval_", "step"))} for row in rows_of(run)]
        for run in (whole, broken)
    ]
    assert evaluations[0] == evaluations[1]
    assert [row["step"] for row in evaluations[0] if "eval_average" in row] == [1, 2]


@pytest.mark.parametrize(("on_start", "saved"), [(False, 2), (True, 0)], ids=["after two steps", "before the first"])
def test_a_run_whose_engine_dies_in_an_evaluation_is_saved_with_its_steps_and_goes_on(
    tiny_config, monkeypatch, on_start, saved
):
    settings = {"max_steps": 3, "eval_steps": 2, "save_steps": 10, "eval_on_start": on_start, **EVALUATED}
    generate = HFEngine.generate

    def dies(engine, prompts, sampling=None):
        if sampling is not None:
            raise RolloutError("the engine is gone.")
        return generate(engine, prompts, sampling)

    monkeypatch.setattr(HFEngine, "generate", dies)
    config = tiny_config(**settings)
    how = rf"the engine is gone.*\n.*after step {saved}: go on with atesd train --resume"
    with pytest.raises(RolloutError, match=how):
        train(config)
    monkeypatch.undo()
    run = train(load_config(None, ["--resume", config.output_dir]))
    evaluated = [row["step"] for row in rows_of(run) if "eval_average" in row]
    assert evaluated == ([0, 2, 3] if on_start else [3])


def test_the_evaluation_sees_the_student_as_it_is_now_and_finds_right_answers(tiny_config, monkeypatch):
    trainer = Trainer(Run.build(tiny_config(eval_steps=1, **EVALUATED)))
    texts, grade = [], trainer.run.evaluation.grader.grade_many

    def noted(said, *rest):
        texts.extend([said] if said else [])
        return grade(said, *rest)

    monkeypatch.setattr(trainer.run.evaluation.grader, "grade_many", noted)
    assert trainer.run.evaluation.measure(1)["eval_average"] == 0
    trainer.run.evaluation.measure(1)
    assert texts[0] == texts[1] and len(texts[0]) == 6
    with torch.no_grad():
        for p in trainer.run.student.trained.values():
            p.normal_()
    trainer.run.evaluation.measure(1)
    assert texts[2] != texts[1]
    right = f"\\boxed{{{trainer.run.data.problems.eval[0].answer}}}"
    monkeypatch.setattr(type(trainer.run.tokenizer), "decode", lambda *_, **__: right)
    answered = trainer.run.evaluation.measure(2)
    assert answered["eval_average"] == answered["eval_pass"] == answered["eval_maj"] == pytest.approx(1 / 3)


def load(config):
    """What a run reads before it loads a model."""
    config.validate()
    return load_run_data(config, load_tokenizer(config), context_length(load_model_config(config)))


def test_evaluations_that_cannot_be_made_are_refused_before_training(tiny_config, monkeypatch):
    with pytest.raises(ConfigError, match="eval_steps is 2 but num_eval_problems is 0"):
        tiny_config(eval_steps=2).validate()
    with pytest.raises(PromptTooLong, match="lower it, or drop the problem"):
        load(tiny_config(**{**EVALUATED, "eval_steps": 2, "eval_max_completion_length": 2040}))
    monkeypatch.setattr("atesd.packages.find_spec", lambda name: None if name == "math_verify" else name)
    with pytest.raises(MissingPackageError, match=r"eval_steps 2.* pip install math-verify"):
        tiny_config(**EVALUATED, eval_steps=2).validate()


@pytest.mark.parametrize("overlong", ("skip", "cut"))
def test_problems_whose_answers_do_not_fit_are_left_out_and_counted(tiny_config, overlong):
    """Of three, the one with the longest prompt; a prompt of the student cannot be cut."""
    settings = {**EVALUATED, "eval_steps": 2, "overlong_problems": overlong}
    whole = load(tiny_config(**settings))
    lengths = {p.id: len(whole.prompts.student(p)) for p in whole.problems.eval}
    longest = max(lengths, key=lengths.get)
    room = whole.prompts.context_length - lengths[longest] + 1
    assert sorted(lengths.values())[-2] < lengths[longest], "one alone is the longest"
    with pytest.warns(UserWarning, match="skipped 1 of .* problems that do not fit"):
        data = load(tiny_config(**{**settings, "eval_max_completion_length": room}))
    assert [p.id for p in data.problems.eval] == [name for name in lengths if name != longest]
    assert data.counts()["problems_too_long"] == 1
    assert len(data.problems.train) == len(whole.problems.train)


def test_no_grading_process_outlives_its_run(tiny_config):
    def graders():
        return [p for p in psutil.Process().children() if "grading.worker" in " ".join(p.cmdline())]

    before = len(graders())
    trainer = Trainer(Run.build(tiny_config(eval_steps=1, **EVALUATED, objective="grpo", num_generations=2)))
    trainer.run.evaluation.grader.grade("\\boxed{x + 1}", "1 + x")
    trainer.run.reward.grader.grade("\\boxed{x + 1}", "1 + x")
    assert len(graders()) > before + 1
    trainer.run.close()
    assert len(graders()) == before


def test_graders_and_engine_are_ended_where_the_rest_of_the_run_cannot_be_made(tiny_config, monkeypatch):
    ended = []
    monkeypatch.setattr(HFEngine, "close", lambda self: ended.append("engine"))
    monkeypatch.setattr(Grader, "close", lambda self: ended.append("grader"))

    def fails(*_, **__):
        raise ValueError("as scripted")

    monkeypatch.setattr(run_parts, "Guards", fails)
    with pytest.raises(ValueError, match="as scripted"):
        Trainer(Run.build(tiny_config(eval_steps=1, **EVALUATED, objective="distill+grpo", num_generations=2)))
    assert ended == ["grader", "grader", "engine"]
