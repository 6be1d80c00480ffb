"""metrics.jsonl is standard JSON, survives kills, and a resumed run's file is that of a run never interrupted."""

import json
import math
import time

import pytest
import torch

from atesd.reports.metrics import PhaseTimer, RunLog, peak_memory_bytes, read_jsonl


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_line_is_standard_json_and_a_non_finite_value_is_named(tmp_path):
    with RunLog(tmp_path, None) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "alpha": torch.tensor(0.25), "tokens": 3})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(line) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "alpha": 0.25,
        "tokens": 3,
        "nonfinite": {"loss": "nan", "grad_norm": "inf"},
    }


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    log = RunLog(tmp_path, None)
    log.log(1, {"loss": 0.5})
    log.sample(1, {"response": "é"})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "response": "é"}]


def test_resuming_gives_the_bytes_of_a_run_never_interrupted(tmp_path):
    rows = {step: {"loss": 1 / (3 * step), "probe_nll": math.nan if step == 2 else 0.1 + step} for step in range(1, 6)}
    with RunLog(tmp_path / "whole", None) as log:
        for step, row in rows.items():
            log.log(step, row)
    with RunLog(tmp_path / "killed", None) as log:
        for step in (1, 2, 3, 4):
            log.log(step, rows[step])
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with RunLog(tmp_path / "killed", resume_step=2) as log:
        assert [row["step"] for row in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == [1, 2]
        for step in (3, 4, 5):
            log.log(step, rows[step])
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


@pytest.mark.parametrize("resume_step", [None, 0])
def test_a_run_that_starts_anew_keeps_nothing_of_the_old_files(tmp_path, resume_step):
    with RunLog(tmp_path, None) as log:
        log.log(1, {"loss": 1.0})
    RunLog(tmp_path, resume_step).close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_phases_add_up_over_a_step_and_start_again_for_the_next():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timer.phase("teacher"):
        raise KeyError("still counted")
    seconds = timer.take()
    assert 0.04 <= seconds["seconds_rollout"] < 0.5
    assert "seconds_teacher" in seconds
    assert timer.take() == {}


def test_peak_memory_counts_bytes_and_grows_with_what_is_allocated():
    before = peak_memory_bytes()
    assert before > 50 * 2**20
    block = torch.ones(before // 4 + 2**24)  # more than the whole peak so far
    assert peak_memory_bytes() >= before + 2**24
    del block
