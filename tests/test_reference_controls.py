"""Runs whose teacher reads something else: only its prompt changes, and a run that goes on reads the same."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from atesd.config import load_config
from atesd.data.segmentation import split_reference
from atesd.errors import ConfigError, DataError
from atesd.planning.dry_run import dry_run
from atesd.run import Run
from atesd.trainer import Trainer, train

CONTROLS = [
    {"reference_source": "other_problem"},
    {"reference_source": "wrong_answer"},
    {"reference_source": "none", "exposure_policy": "full"},
    {"exposure_order": "trailing"},
    {"exposure_order": "random"},
]
NAMES = ["other_problem", "wrong_answer", "none", "trailing", "random"]


def lines_of(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("settings", CONTROLS, ids=NAMES)
def test_only_the_teacher_s_prompt_changes(tiny_config, tmp_path, settings):
    built = [Run.build(tiny_config(output_dir=str(tmp_path / str(i)), **more)) for i, more in enumerate(({}, settings))]
    usual, control = (run.data for run in built)
    assert usual.problems == control.problems
    assert usual.references == control.references
    for problem in usual.problems.train:
        assert usual.prompts.student(problem) == control.prompts.student(problem)
        assert usual.teacher_prompt(problem, 0.67) != control.teacher_prompt(problem, 0.67)
    assert built[0].exposure.meter.probe_nll() == built[1].exposure.meter.probe_nll()
    for run in built:
        run.close()


@pytest.mark.parametrize("settings", CONTROLS, ids=NAMES)
def test_a_run_trains_and_its_samples_tell_what_the_teacher_read(tiny_config, settings):
    run_dir = train(tiny_config(max_steps=2, **settings))
    for sample in lines_of(run_dir, "samples.jsonl"):
        own = split_reference(
            next(row["solution"] for row in ROWS if row["problem"] == sample["problem"]), sample["answer"]
        )
        exposed = sample["exposed"]
        if settings.get("reference_source") == "none":
            assert exposed == ""
        elif "exposure_order" in settings:
            assert all(piece.strip() in exposed or piece.strip() in own.solution for piece in own.segments)
        elif exposed.strip():
            assert settings["reference_source"] == "wrong_answer" or not own.solution.startswith(exposed)


ROWS = [
    {
        "problem": f"Ann has {n} pens and buys {n + 2}. She gives {n} away. How many are left?",
        "solution": f"First she has {n} pens.\n\nThen she has {2 * n + 2}.\n\nShe gives {n} away.\n\n#### {n + 2}",
    }
    for n in range(1, 17)
]


def test_without_a_reference_the_dry_run_and_the_run_say_that_there_is_no_signal(tiny_config, tmp_path):
    settings = {"reference_source": "none", "exposure_policy": "full", "num_probe_problems": 0, "max_steps": 1}
    settings |= {"progress_signal": "distill_loss", "entry_clip": None}
    with pytest.warns(UserWarning, match="no signal"):
        told = str(dry_run(tiny_config(**settings)))
    assert re.search(r"no signal +the teacher reads what the student reads", told)
    with pytest.warns(UserWarning, match="no signal"):
        run_dir = train(tiny_config(**settings))
    assert abs(lines_of(run_dir, "metrics.jsonl")[0]["loss"]) < 1e-9
    own = tiny_config(**{**settings, "output_dir": str(tmp_path / "own"), "reference_source": "own"})
    assert "no signal" not in str(dry_run(own))


def test_a_run_that_goes_on_shows_its_teacher_the_same(tiny_config, tmp_path):
    settings = {"reference_source": "other_problem", "exposure_order": "random"}
    whole = train(tiny_config(max_steps=4, output_dir=str(tmp_path / "whole"), **settings))
    part = train(tiny_config(max_steps=2, output_dir=str(tmp_path / "part"), **settings))
    train(load_config(None, ["--resume", str(part), "--max_steps", "4"]))
    assert [r["exposed"] for r in lines_of(part, "samples.jsonl")] == [
        r["exposed"] for r in lines_of(whole, "samples.jsonl")
    ]
    assert [r["loss"] for r in lines_of(part, "metrics.jsonl")] == [r["loss"] for r in lines_of(whole, "metrics.jsonl")]
    with pytest.raises(ConfigError, match="reference_source is 'own'"):
        load_config(None, ["--resume", str(part), "--reference_source", "own"])


def test_exposure_runs_over_segments_that_the_data_give(tiny_config, tmp_path):
    path = tmp_path / "helps.jsonl"
    helps = [["Kind: counting."], ["Kind: counting.", "Add, then take away."], ["Kind: counting.", "Plan.", "Work."]]
    rows = [{**row, "answer": str(n + 3), "helps": helps[n % 3]} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"dataset_name": str(path), "segments_column": "helps", "max_steps": 2}
    settings |= {"exposure_policy": "fixed", "fixed_alpha": 0.7}
    run = Run.build(tiny_config(**settings))
    for problem in run.data.problems.train:
        m = len(problem.segments)
        shown = run.data.exposed(problem, 0.7)
        assert shown == "".join(piece + "\n\n" for piece in problem.segments[: int(0.7 * m)])
    text = run.tokenizer.decode(
        run.data.teacher_prompt(next(p for p in run.data.problems.train if len(p.segments) == 3), 0.7)
    )
    assert "Kind: counting.\n\nPlan." in text and "Work." not in text and "beginning" not in text
    Trainer(run).train()
    run.close()


def test_data_without_a_solution_column_take_the_segments_for_the_solution(tiny_config, tmp_path):
    path = tmp_path / "helps.jsonl"
    rows = [{"problem": f"{n} + 1?", "answer": str(n + 1), "helps": ["Add one.", f"So {n + 1}."]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = Run.build(tiny_config(dataset_name=str(path), segments_column="helps"))
    assert all(p.solution == "\n\n".join(p.segments) for p in run.data.problems.train)
    run.close()
    for number, bad in enumerate(("no list", 7, None, [1])):
        path.write_text("".join(json.dumps({**row, "helps": bad}) + "\n" for row in rows), encoding="utf-8")
        with pytest.raises(DataError, match="segments_column='helps' must hold a list of texts"):
            out = str(tmp_path / f"bad-{number}")
            Run.build(tiny_config(dataset_name=str(path), segments_column="helps", output_dir=out))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reference_source": "none"}, "exposure_policy 'atesd' would learn from an exposure that changes nothing"),
        (
            {"reference_source": "none", "exposure_policy": "full", "exposure_order": "random"},
            "exposure_order would be",
        ),
        ({"objective": "sft", "exposure_policy": "full", "reference_source": "other_problem"}, "has no teacher"),
        ({"objective": "sft", "exposure_policy": "full", "exposure_order": "trailing"}, "has no teacher"),
        ({"reference_source": "others"}, "reference_source"),
    ],
)
def test_what_would_be_ignored_is_refused(tiny_config, settings, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**settings).validate()


def test_the_settings_are_saved_and_read_back(tiny_config, tmp_path):
    config = tiny_config(reference_source="other_problem", exposure_order="trailing")
    config.save(tmp_path)
    read = load_config(str(tmp_path / "config.yaml"), ["--output_dir", str(tmp_path / "new")])
    assert dataclasses.asdict(read)["reference_source"] == "other_problem"
