"""The folder of an evaluation: one process writes it, other settings and damage are named, nothing foreign goes."""

from __future__ import annotations

import json
import shutil

import pytest

from atesd.evaluation import command as evaluation
from atesd.evaluation.command import evaluate
from atesd.evaluation.files import EvalError, SampleFile
from atesd.evaluation.report import load_run
from tests.run_logs import rows_of

pytest.importorskip("math_verify", reason="grading needs math-verify")


def test_a_finished_evaluation_does_nothing_when_run_again(make, monkeypatch):
    folder = evaluate(make())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(evaluation, "load_student", lambda *_: pytest.fail("the weights were loaded"))
    assert evaluate(make()) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_settings_on_the_same_folder_are_refused_by_name_and_free_ones_are_not(make, tmp_path, tiny_model_path):
    folder = evaluate(make())
    with pytest.raises(EvalError, match=r"temperature was 1.0 and is 0.7; seed was 0 and is 3. Choose another"):
        evaluate(make(temperature=0.7, seed=3))
    with pytest.raises(EvalError, match=r"num_problems was 3 and is 4; problems count was 3 and is 4"):
        evaluate(make(num_problems=4))
    before = json.loads((folder / "results.json").read_text())
    evaluate(make(confidence=0.5, grading_processes=1))
    after = json.loads((folder / "results.json").read_text())
    assert (before["confidence"], after["confidence"]) == (0.95, 0.5) and after["problems"] == before["problems"]
    assert "50 % interval" in (folder / "results.md").read_text()
    # the same path with other weights is another model
    moved = tmp_path / "model"
    shutil.copytree(tiny_model_path, moved)
    evaluate(make(model_name_or_path=str(moved), output_dir=str(tmp_path / "moved")))
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EvalError, match="model files was"):
        evaluate(make(model_name_or_path=str(moved), output_dir=str(tmp_path / "moved")))


def test_one_process_at_a_time_writes_an_evaluation(make):
    folder = evaluate(make())
    (folder / "results.json").unlink()
    with SampleFile(folder), pytest.raises(EvalError, match="being written by another evaluation"):
        evaluate(make())


def test_samples_of_something_else_and_damaged_lines_are_refused(make):
    folder = evaluate(make())
    rows = rows_of(folder, "samples.jsonl")
    file = folder / "samples.jsonl"
    file.write_text(json.dumps({**rows[0], "seed": 5}) + "\n")
    with pytest.raises(EvalError, match="samples that are not of this evaluation"):
        evaluate(make())
    file.write_text('{"problem_id": \n' + json.dumps(rows[0]) + "\n")
    with pytest.raises(EvalError, match="is damaged"):
        evaluate(make())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("samples.jsonl", b"\xff\xfe\n", "line 1 of .*samples.jsonl is damaged .*remove that line"),
        ("samples.jsonl", b'{"step": 1, "loss": 0.5}\n', "it is no sample of an evaluation"),
        ("samples.jsonl", b"[" * 100_000 + b"\n", "line 1 of .*samples.jsonl is damaged"),
        ("eval_config.json", b"\xff\xfe", "eval_config.json is damaged .*run the evaluation again"),
        ("eval_config.json", b"[]\n[", "eval_config.json is damaged"),
        ("eval_config.json", b'{"settings": 3}', "eval_config.json is damaged .it has no settings"),
    ],
)
def test_damaged_files_of_an_evaluation_are_named_and_left_as_they_are(make, name, content, told):
    folder = evaluate(make())
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    with pytest.raises(EvalError, match=told):
        evaluate(make())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    if name == "eval_config.json":
        with pytest.raises(EvalError, match=r"eval_config\.json is damaged"):
            load_run(folder)


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b'{"metrics": {}}'])
def test_damaged_results_are_named_and_made_again_from_the_samples(make, content, monkeypatch):
    folder = evaluate(make())
    whole = (folder / "results.json").read_bytes()
    (folder / "results.json").write_bytes(content)
    with pytest.raises(EvalError, match=r"results\.json is damaged"):
        load_run(folder)
    monkeypatch.setattr(evaluation, "load_student", lambda *_: pytest.fail("the weights were loaded"))
    evaluate(make())
    assert (folder / "results.json").read_bytes() == whole


def test_an_evaluation_that_another_process_writes_keeps_its_settings(make):
    folder = evaluate(make())
    before = (folder / "eval_config.json").read_bytes()
    with SampleFile(folder), pytest.raises(EvalError, match="being written by another evaluation"):
        evaluate(make(confidence=0.5))
    assert (folder / "eval_config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["results.md", "results.html", "results.json"])
def test_an_evaluation_takes_no_file_that_it_has_not_written(make, tmp_path, name):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / name).write_text("mine")
    with pytest.raises(EvalError, match=f"holds {name} but no eval_config.json"):
        evaluate(make())
    assert [path.name for path in (tmp_path / "eval").iterdir()] == [name]


@pytest.mark.parametrize("place", ["generate_samples", "summarise"])
def test_an_evaluation_whose_folder_is_removed_says_so_and_makes_it_not_again(make, monkeypatch, tmp_path, place):
    do = getattr(evaluation, place)

    def removed(*arguments):
        shutil.rmtree(tmp_path / "eval")
        return do(*arguments)

    monkeypatch.setattr(evaluation, place, removed)
    with pytest.raises(EvalError, match="eval is no longer there: somebody removed or renamed it"):
        evaluate(make())
    assert not (tmp_path / "eval").exists()
