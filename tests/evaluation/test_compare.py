"""Comparing finished evaluations, written by hand: no model is needed."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from atesd import cli
from atesd.config.eval_config import EvalConfig, load_eval_config
from atesd.evaluation.compare import compare, paired
from atesd.evaluation.files import EvalError
from atesd.evaluation.report import load_run, write_reports
from atesd.evaluation.statistics import estimate


@pytest.fixture
def written(tmp_path):
    """Writes a finished evaluation whose problems have these numbers of right samples out of k."""

    def write(name, right, k=4, digest="d", **settings):
        config = EvalConfig(model_name_or_path="m", dataset_name="aime24", output_dir=str(tmp_path / name))
        record = {
            "settings": {**asdict(config), "num_generations": k, "num_bootstrap": 2000, **settings},
            "prompt": "{problem} <b>?",
            "problems": {"count": len(right), "digest": digest},
            "model": {"files": name},
            "adapter": {"files": None},
            "device": "cpu",
            "versions": {"torch": "2"},
        }
        rows = {
            f"p-{i}": {
                f"average@{k}": c / k, f"pass@{k}": float(c > 0), f"maj@{k}": float(c > k / 2),
                "response_length": 100.0 + c, "truncated": 0.0, "no_answer": 0.25,
            }
            for i, c in enumerate(right)
        }  # fmt: skip
        names = list(rows["p-0"])
        metrics = estimate(np.array([list(row.values()) for row in rows.values()]), 0.95, 2000)
        results = {"metrics": dict(zip(names, map(asdict, metrics), strict=True)), "problems": rows}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "eval_config.json").write_text(json.dumps(record))
        (folder / "results.json").write_text(json.dumps({**results, "seen_in_training": None}))
        return folder

    return write


def test_the_difference_is_the_second_run_less_the_first_problem_by_problem(written):
    a, b = load_run(written("a", [0, 2, 4, 1])), load_run(written("b", [1, 2, 3, 4]))
    pair = paired(a, b)
    assert pair["by_problem"] == {"p-0": 0.25, "p-1": 0.0, "p-2": -0.25, "p-3": 0.75}
    assert (pair["better"], pair["worse"], pair["equal"]) == (2, 1, 1)
    average = pair["metrics"]["average"]
    assert (average["a"], average["b"], average["value"]) == (7 / 16, 10 / 16, 3 / 16)
    assert average["low"] < 3 / 16 < average["high"]
    assert pair["metrics"]["pass@4"]["value"] == 0.25
    assert pair["settings"] == {}


def test_a_small_steady_gain_is_seen_where_separate_intervals_overlap(written):
    rng = np.random.default_rng(0)
    before = rng.integers(0, 12, 60)
    after = np.minimum(before + rng.integers(0, 2, 60), 12)
    a, b = load_run(written("a", before.tolist(), k=12)), load_run(written("b", after.tolist(), k=12))
    assert a.metrics["average@12"]["high"] > b.metrics["average@12"]["low"]
    assert paired(a, b)["metrics"]["average"]["low"] > 0


def test_runs_of_another_k_are_compared_by_what_they_share_and_the_difference_is_named(written):
    pair = paired(load_run(written("a", [1, 2])), load_run(written("b", [1, 2], k=8, temperature=0.6)))
    assert set(pair["metrics"]) == {"average", "response_length", "truncated", "no_answer"}
    assert pair["settings"] == {"num_generations": [4, 8], "temperature": [1.0, 0.6]}


def test_several_runs_come_in_one_table_each_against_the_first_on_its_problems(written, tmp_path):
    runs = [written("base", [0, 1, 2]), written("opsd", [1, 1, 4]), written("hmmt", [4, 4], digest="e")]
    runs += [written("atesd", [4, 4, 4]), written("hmmt-b", [0, 4], digest="e")]
    folder = compare(runs, tmp_path / "out")
    pairs = json.loads((folder / "comparison.json").read_text())["pairs"]
    assert [(p["a"], p["b"]) for p in pairs] == [("base", "opsd"), ("base", "atesd"), ("hmmt", "hmmt-b")]
    markdown = (folder / "comparison.md").read_text()
    for run in runs:
        assert f"| {run.name} | m |" in markdown
    assert "| average | 25.0 % | 50.0 % | +25.0 points |" in markdown
    assert "Better on 2 problems, worse on 0, equal on 1." in markdown
    page = (folder / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 3


def test_what_cannot_be_compared_is_refused_by_name(written, tmp_path):
    a, other = written("a", [1, 2]), written("other", [1, 2], digest="x", dataset_name="aime25")
    with pytest.raises(EvalError, match="needs two evaluations"):
        compare([a])
    with pytest.raises(EvalError, match=r"answered the same problems \(a: 2 of aime24, other: 2 of aime25\)"):
        compare([a, other])
    with pytest.raises(EvalError, match="is no evaluation"):
        compare([a, tmp_path])
    (other / "results.json").unlink()
    with pytest.raises(EvalError, match="is not finished"):
        compare([a, other])


def test_the_command_prints_the_tables_and_writes_the_page(written, tmp_path, capsys):
    folders = [str(written("a", [0, 2])), str(written("b", [1, 2]))]
    assert cli.main(["eval", "--compare", *folders, "--output_dir", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "\nb - a\n" in text and "comparison.html" in text
    assert cli.main(["eval", "--compare", folders[0]]) == 1
    assert "needs two evaluations" in capsys.readouterr().err


def test_a_page_escapes_what_it_shows_and_warns_of_problems_seen_in_training(written):
    folder = written("a", [1, 2, 3])
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "seen_in_training": ["p-0"]}))
    write_reports(folder)
    page = (folder / "results.html").read_text()
    assert "&lt;b&gt;?" in page and "{problem} <b>?" not in page
    assert (
        "1 of these problems were trained on" in page and "1 of these problems" in (folder / "results.md").read_text()
    )


def test_a_model_that_boxes_no_answer_is_told_what_to_do(written):
    folder = written("a", [1, 2, 3])
    write_reports(folder)
    assert "--no_box_only" not in (folder / "results.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    results["metrics"]["no_answer"]["value"] = 0.9
    (folder / "results.json").write_text(json.dumps(results))
    write_reports(folder)
    assert "90.0 % of the samples hold no \\boxed{}" in (folder / "results.md").read_text()
    assert "--no_box_only" in (folder / "results.html").read_text()
    assert load_eval_config(["--model", "m", "--data", "d", "--no_box_only"]).box_only is False


def test_one_problem_has_no_interval_and_says_so(written):
    folder = written("a", [1])
    write_reports(folder)
    assert "no interval: one problem" in (folder / "results.md").read_text()


def test_a_comparison_takes_no_file_that_it_has_not_written(written, tmp_path):
    folders = [written("a", [0, 2]), written("b", [1, 2])]
    (tmp_path / "a" / "comparison.md").write_text("mine")
    with pytest.raises(EvalError, match=r"holds comparison\.md, which no comparison has written"):
        compare(folders, tmp_path / "a")
    assert (tmp_path / "a" / "comparison.md").read_text() == "mine"
    out = compare(folders, tmp_path / "b")  # beside an evaluation's own files
    assert compare(folders, out) == out and not (out / ".lock").exists()


@pytest.mark.parametrize("name", ["a/results.json", "a/results.json/below", "x" * 300])
def test_a_place_that_no_comparison_can_have_is_refused_by_name(written, tmp_path, capsys, name):
    folders = [str(written("a", [0, 2])), str(written("b", [1, 2]))]
    assert cli.main(["eval", "--compare", *folders, "--output_dir", str(tmp_path / name)]) == 2
    assert "cannot be made or written to" in capsys.readouterr().err
