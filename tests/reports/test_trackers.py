"""`report_to`: what a tracker of accelerate is given is what metrics.jsonl holds, and the run's settings."""

from __future__ import annotations

import json
from dataclasses import asdict

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from atesd.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=[True, False], ids=["writes into a folder", "needs no folder"])
def tracker(request, monkeypatch):
    """A stand-in for tensorboard (which writes into a folder) or wandb; it keeps what it was given."""

    class Tracker(accelerate.tracking.GeneralTracker):
        name = "tensorboard" if request.param else "wandb"
        requires_logging_directory = request.param
        settings, rows, places = None, [], []

        def __init__(self, run_name, logging_dir=None, **_):
            super().__init__(_blank=True)
            self.places.append((run_name, logging_dir))

        def start(self):
            pass

        def store_init_configuration(self, values):
            type(self).settings = values

        def log(self, values, step=None, **_):
            self.rows.append({"step": step, **values})

        @property
        def tracker(self):
            return self

        def finish(self):
            pass

    kind = LoggerType(Tracker.name)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, str(kind), Tracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [kind])
    monkeypatch.setattr("atesd.config.checks.find_spec", lambda name: name)
    return Tracker


def test_a_tracker_gets_the_metrics_under_their_names_and_every_setting(tracker, tiny_config, tmp_path):
    config = tiny_config(report_to=tracker.name, max_steps=4, logging_steps=2)
    run_dir = train(config)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in tracker.rows] == [2, 4]
    for row, line in zip(tracker.rows, lines[1::2], strict=True):
        assert set(row) == set(line) and row["loss"] == line["loss"] and row["alpha"] == line["alpha"]
    assert tracker.settings == asdict(config)
    folder = str(run_dir) if tracker.requires_logging_directory else None
    assert tracker.places == [("atesd", folder)]


def test_what_is_measured_before_training_is_step_0(tracker, tiny_config):
    pytest.importorskip("math_verify")
    train(tiny_config(report_to=tracker.name, max_steps=1, eval_steps=1, num_eval_problems=2, eval_k=1))
    assert [row["step"] for row in tracker.rows] == [0, 1] and "eval_average" in tracker.rows[0]


def test_without_trackers_nothing_is_logged_elsewhere(tracker, tiny_config):
    train(tiny_config(max_steps=1))
    assert tracker.rows == [] and tracker.settings is None
