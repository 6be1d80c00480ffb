"""A run that a guard has ended stays ended: however it was interrupted, and until the guard's rules change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atesd import guards
from atesd.guards import Guards
from atesd.run import Run
from atesd.stopping import StopSignals
from atesd.trainer import train
from tests.quiet import quietly
from tests.run_logs import resume, rows_of


def go_on(run_dir: Path, *flags: str) -> Path:
    return quietly(lambda: train(resume(run_dir, *flags)))


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in rows_of(run_dir)]


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(params=["early_stopping_patience", "stop_on_collapse"])
def guarded(request, tiny_config, monkeypatch):
    """Settings of a run that a guard ends before its six steps, and those with which it goes on."""
    if request.param == "stop_on_collapse":
        monkeypatch.setattr(guards, "REPETITION_BOUND", -1.0)  # every step shows this sign
        return tiny_config(max_steps=6, stop_on_collapse=True), ("--stop_on_collapse=false",)
    config = tiny_config(max_steps=6, early_stopping_patience=2, learning_rate=1e-30, probe_every=1)
    return config, ("--early_stopping_patience", "50")


def test_a_run_that_a_guard_has_ended_is_finished_until_its_rules_change(guarded, capsys):
    config, goes_on = guarded
    run_dir = quietly(lambda: train(config))
    ended, summary = steps_of(run_dir), summary_of(run_dir)
    assert ended == [1, 2, 3] and summary["stopped"]
    for flags in ((), ("--max_steps", "9")):
        capsys.readouterr()
        go_on(run_dir, *flags)
        told = capsys.readouterr().out
        assert f"the run is finished after step 3: {summary['stopped']}" in told
        assert steps_of(run_dir) == ended and summary_of(run_dir) == summary
    go_on(run_dir, *goes_on, "--max_steps", "6")
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6] and summary_of(run_dir)["stopped"] is None


@pytest.mark.parametrize("when", ["finish", "signal"])
def test_a_run_interrupted_when_a_guard_ends_it_ends_there_all_the_same(guarded, monkeypatch, when):
    config, _ = guarded
    after_step = Guards.after_step

    def interrupted(self, *arguments):
        if (reason := after_step(self, *arguments)) and when == "signal":
            signals.note(15, None)
        return reason

    def killed(self):
        raise KeyboardInterrupt

    signals = StopSignals()
    with monkeypatch.context() as patch:
        patch.setattr("atesd.trainer.StopSignals", lambda: signals)
        patch.setattr(Guards, "after_step", interrupted)
        if when == "finish":
            patch.setattr(Run, "finish", killed)
            with pytest.raises(KeyboardInterrupt):
                quietly(lambda: train(config))
        else:
            quietly(lambda: train(config))
    run_dir = Path(config.output_dir)
    go_on(run_dir)
    assert steps_of(run_dir) == [1, 2, 3] and summary_of(run_dir)["steps"] == 3
    assert summary_of(run_dir)["stopped"] and (run_dir / "adapter").is_dir()
