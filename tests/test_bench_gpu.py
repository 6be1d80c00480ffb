"""`python -m bench.gpu` without a GPU: its stages' bookkeeping, time limits and tables. `--dry` runs the stages."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from bench import machine
from bench.gpu import __main__ as command
from bench.gpu import correct, report, tables, training
from bench.gpu.stage import Stage, read


def options(out, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "stages": [1, 2], "minutes": 1.0, "dry": False, **changes})


@pytest.mark.parametrize("text, expected", (("1-4", [1, 2, 3, 4]), ("3,5-7", [3, 5, 6, 7]), ("2", [2])))
def test_stages_are_named_by_numbers_and_ranges(text, expected):
    assert command.numbers(text) == expected


def test_a_stage_there_is_not_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="numbered 1 to 8, got 9"):
        command.numbers("7-9")
    with pytest.raises(argparse.ArgumentTypeError, match="3-1 names no stage"):
        command.numbers("3-1")


def test_a_stage_that_begins_again_forgets_what_it_had_left_out_and_keeps_dry_and_real_apart(tmp_path):
    first, other = Stage("step", tmp_path, 10), Stage("card", tmp_path, 10)
    first.keep(loss=1)
    other.keep(copy=1)
    for stage in (first, other):
        stage.leave_out("a part", "no time")
    Stage("step", tmp_path, 10).begin()
    assert list(read(tmp_path)["stages"]) == ["card"]
    assert list(read(tmp_path)["left_out"]) == ["card: a part"]
    with pytest.raises(RuntimeError, match="holds results of a real run, and this is a dry run: give another --out"):
        Stage("step", tmp_path, 10, dry=True).begin()


def test_a_run_is_right_where_checks_passed_and_tests_ran_and_none_failed():
    def result(passed, tests, failed):
        tests = {"kernels": {"passed": tests, "failed": failed}}
        return {"stages": {"correct": {"checks": {"graph": {"passed": passed}}, "tests": tests}}}

    assert command.is_right({}) and command.is_right(result(True, 5, 0)) and command.is_right(result(None, 5, 0))
    assert not any(map(command.is_right, (result(False, 5, 0), result(True, 5, 1), result(True, 0, 0))))


def test_what_a_stage_keeps_is_on_the_disk_at_once_beside_what_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    Stage("card", tmp_path, 10).keep(copy=1)
    stage = Stage("step", tmp_path, 10)
    stage.keep(rows={"a": 1})
    stage.keep(loss=2)
    stage.leave_out("vLLM", "not installed")
    kept = {"card": {"commit": "abc", "copy": 1}, "step": {"commit": "abc", "rows": {"a": 1}, "loss": 2}}
    assert read(tmp_path)["stages"] == kept
    assert read(tmp_path)["left_out"] == {"step: vLLM": "not installed"}


def test_a_stage_that_hangs_is_stopped_at_its_limit_and_one_that_crashes_is_named(tmp_path, monkeypatch):
    start = command.start
    with (tmp_path / "log.txt").open("a") as log:
        for body, expected in (
            ("import time; print('begun', flush=True); time.sleep(60)", "stopped at its limit of 0 s"),
            ("raise SystemExit(3)", "its process ended with status 3; see log.txt"),
            ("pass", "done"),
        ):
            monkeypatch.setattr(command, "start", lambda _, body=body: start([sys.executable, "-c", body]))
            assert command.run_stage(1, 0.2, options(tmp_path), log) == expected
    assert "begun" in (tmp_path / "log.txt").read_text()


def test_what_does_not_fit_into_the_minutes_is_left_out_and_named(tmp_path):
    assert command.run_all(options(tmp_path, minutes=0.0)) == 0
    assert read(tmp_path)["left_out"] == dict.fromkeys(("card", "correct"), "the minutes were used up")
    assert "- correct: the minutes were used up" in (tmp_path / "log.txt").read_text()


def test_a_stage_cut_short_still_has_a_place_in_the_tables():
    text = report.markdown({"stages": {"headline": {"tokens": 5}}, "left_out": {"step": "no time"}})
    assert "### headline" in text and "(no table: KeyError" in text and "- step: no time" in text


def test_without_a_result_the_tables_say_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert {table() for table in tables.TABLES.values()} == {"Not yet measured on a GPU.\n"}


def test_every_row_of_a_gpu_s_table_names_the_card(tmp_path, monkeypatch):
    committed = json.loads((machine.ROOT / "bench/results/gpu/nvidia-h200.json").read_text())
    committed["stages"]["card"]["card"]["name"] = "Another GPU"
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/another.json").write_text(json.dumps(committed))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for name in ("gpu_losses", "gpu_divergences", "gpu_step", "gpu_correct"):
        rows = tables.TABLES[name]().split("<sub>")[0].strip().splitlines()[2:]
        assert len(rows) >= 5 and all("| Another GPU |" in row for row in rows), name


def test_a_target_is_judged_by_its_worst_figure(monkeypatch):
    monkeypatch.setattr(tables, "gradient_errors", lambda: iter([(0.1, "one"), (0.7, "two")]))
    what, limit, _, worst, within = tables.TARGETS[0]
    monkeypatch.setattr(tables, "TARGETS", [(what, limit, tables.gradient_errors, worst, within)])
    assert "| 0.7 | two | **no** |" in tables.target_rows()


def test_outcomes_are_counted_by_file_also_of_tests_whose_names_hold_spaces(tmp_path):
    output = (
        "[gw0] [ 1%] PASSED tests/a.py::t[x] \n[gw1] FAILED tests/b.py::t[two words] \n[gw0] SKIPPED tests/b.py::u\n"
    )
    output += "= short test summary info =\nFAILED tests/a.py::t[x]\n"
    report = tmp_path / "report.xml"
    failure = '<testcase classname="tests.b" name="t[two words]"><failure message="too large"/></testcase>'
    report.write_text(f"<testsuite>{failure}</testsuite>")
    found = correct.counts(output, ("tests/b.py",), correct.failures(report))
    assert found == {"passed": 0, "failed": 1, "skipped": 1, "failures": {"tests/b.py::t[two words]": "too large"}}
    assert correct.outcome(correct.counts(output, ("tests/a.py",), {})) == "1 passed, 0 failed, 0 skipped"


def test_two_runs_are_compared_row_by_row():
    def rows(*losses):
        names = dict.fromkeys(training.COMPARED_METRICS, 1.0)
        return [{**names, "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]

    assert training.difference(rows(2.0, 4.0), rows(2.0, 4.0))["equal"]
    found = training.difference(rows(2.0, 4.0), rows(2.0, 5.0))
    assert (found["equal"], found["first"], found["largest"]["loss"]) == (False, 2, 0.25)
    assert training.difference(rows(2.0), rows(2.0, 5.0))["first"] is None
