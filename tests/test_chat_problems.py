"""Runs on chats of several turns: every part of a run reads the whole chat, and going on reads it again."""

from __future__ import annotations

import json

import pytest

from atesd.config import load_config
from atesd.config.eval_config import EvalConfig
from atesd.data.problems import load_problems
from atesd.evaluation.benchmarks import load_benchmark, seen_in_training
from atesd.inputs import input_digests
from atesd.planning.dry_run import dry_run
from atesd.run import Run
from atesd.trainer import train


def chat(n, first=None):
    first = n if first is None else first
    return [
        {"role": "system", "content": "Count well."},
        {"role": "user", "content": f"Ann has {first} pens."},
        {"role": "assistant", "content": f"So she has {first}."},
        {"role": "user", "content": "She buys 2 more. How many now?"},
        {"role": "assistant", "content": f"Add 2.\n\nThen she has {n + 2}.\n\n#### {n + 2}"},
    ]


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats), encoding="utf-8")
    return str(path)


@pytest.fixture
def chats(tmp_path):
    """Twelve chats whose last turns are all alike."""
    return write(tmp_path / "chats.jsonl", [chat(n) for n in range(1, 13)])


def lines_of(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "sft", "exposure_policy": "full"},
        {"objective": "distill+sft"},
        {"objective": "distill+grpo", "num_generations": 2},
        {"reference_source": "other_problem", "teacher_views": '{"exposed": 1.2, "none": -0.2}'},
    ],
    ids=lambda settings: settings.get("objective", "/".join(settings)) or "distill",
)
@pytest.mark.filterwarnings("ignore")
def test_every_objective_trains_on_chats_that_differ_in_an_earlier_turn_only(tiny_config, chats, settings):
    run_dir = train(tiny_config(dataset_name=chats, max_steps=1, **settings))
    assert json.loads((run_dir / "summary.json").read_text())["problems_used"] == 10
    samples = lines_of(run_dir, "samples.jsonl")
    assert all(line["problem"].startswith("system: Count well.\n\nuser: Ann has ") for line in samples)
    assert all(row["skipped"] == 0 for row in lines_of(run_dir, "metrics.jsonl"))


def test_another_problem_s_reference_is_read_after_the_own_chat(tiny_config, chats):
    run = Run.build(tiny_config(dataset_name=chats, reference_source="other_problem"))
    for problem in run.data.problems.train:
        text = run.tokenizer.decode(run.data.teacher_prompt(problem, 1.0))
        own = problem.earlier[1][1]
        assert own in text and text.count("pens") == 1
        assert problem.solution not in text and "Then she has" in text
        (prompt,), (reply,), _ = run.data.imitated([problem])
        assert own in run.tokenizer.decode(prompt) and run.tokenizer.decode(reply).startswith(problem.solution)
    run.close()


def test_a_run_on_chats_goes_on_with_the_same_ones(tiny_config, chats, tmp_path):
    whole = train(tiny_config(dataset_name=chats, max_steps=4, output_dir=str(tmp_path / "whole")))
    part = train(tiny_config(dataset_name=chats, max_steps=2, output_dir=str(tmp_path / "part")))
    train(load_config(None, ["--resume", str(part), "--max_steps", "4"]))
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [
            [{k: v for k, v in row.items() if k in ("loss", "mismatch", "problem", "response")} for row in found]
            for found in (lines_of(part, name), lines_of(whole, name))
        ]
        assert rows[0] == rows[1]


def test_a_changed_earlier_turn_is_a_changed_input_and_another_problem(tiny_config, tmp_path):
    digests, found = [], []
    for index, first in enumerate((None, 77)):
        path = write(tmp_path / "chats.jsonl", [chat(1, first), *(chat(n) for n in range(2, 13))])
        run = Run.build(tiny_config(dataset_name=path, num_probe_problems=0, progress_signal="distill_loss",
                                    output_dir=str(tmp_path / str(index))))  # fmt: skip
        digests.append(input_digests(run.config, run.data, run.tokenizer)["the training problems"])
        found.append({p.key for p in run.data.problems.train})
        run.close()
    assert digests[0] != digests[1]
    assert len(found[0] - found[1]) == len(found[1] - found[0]) == 1


def test_the_dry_run_shows_the_chat_and_measures_its_prompts(tiny_config, chats):
    shown = dry_run(tiny_config(dataset_name=chats)).data
    student = next(row for row in shown["prompts"] if row["prompt"] == "student")
    assert "system\nCount well." in student["text"] and "user\nShe buys 2 more." in student["text"]
    assert "pens" in student["text"] and "#### " not in student["text"]


@pytest.mark.filterwarnings("ignore")
def test_a_chat_that_does_not_fit_is_skipped_and_counted_by_its_whole_length(tiny_config, tmp_path):
    long = chat(1)
    long[1]["content"] += " They are red." * 60
    path = write(tmp_path / "chats.jsonl", [long, *(chat(n) for n in range(2, 13))])
    run_dir = train(tiny_config(dataset_name=path, max_steps=1, overlong_problems="skip", max_prompt_length=300,
                                num_probe_problems=0, progress_signal="distill_loss"))  # fmt: skip
    assert json.loads((run_dir / "summary.json").read_text())["problems_too_long"] == 1


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_asks_chats_and_knows_which_it_was_trained_on(tiny_config, chats, tmp_path):
    run_dir = train(tiny_config(dataset_name=chats, max_steps=1, eval_steps=1, num_eval_problems=2, eval_k=1))
    answers = lines_of(run_dir / "answers", "step-1.jsonl")
    assert all("Ann has" in line["problem"] for line in answers)
    fresh = write(tmp_path / "fresh.jsonl", [chat(n) for n in range(11, 15)])
    asked = load_benchmark(EvalConfig(dataset_name=fresh))
    trained = {p.key for p in load_problems(chats, num_train=None, num_probe=0, num_eval=0, seed=0).train}
    held_out = {line["problem"] for line in answers}
    seen = seen_in_training(asked, run_dir)
    assert set(seen) == {p.id for p in asked if p.key in trained and p.text not in held_out}
