"""The learning-curve benchmark for a step on the tiny model: its result, its table, and going on with a stopped run."""

from __future__ import annotations

import json
import warnings

import pytest

from atesd.trainer import Trainer
from bench import learning_curves, machine, table


@pytest.fixture
def flags(tiny_config, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(learning_curves, "NUM_PROBLEMS", 3)
    config = tiny_config(max_steps=2)
    names = "model_name_or_path dataset_name num_probe_problems max_steps max_completion_length lora_r"
    flags = [flag for name in names.split() for flag in (f"--{name}", str(getattr(config, name)))]
    return [*flags, "--num_train_problems", "8", "--save_steps", "1", "--work", str(tmp_path / "work")]


def test_one_run_an_invocation_resumed_after_a_kill_and_every_result_a_row(flags, tmp_path, monkeypatch):
    warnings.simplefilter("ignore")
    assert table.render("learning_curves").startswith("(not measured yet")
    step, steps = Trainer.train_step, []

    def dies_once(self, t):
        steps.append(t)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", dies_once)
    with pytest.raises(KeyboardInterrupt):
        learning_curves.main(flags)
    learning_curves.main(flags)
    learning_curves.main(flags)
    assert steps == [0, 1, 1, 0, 1], "the run that was killed goes on, the next invocation makes the next run"
    results = sorted(path.name for path in (tmp_path / "results" / "learning_curves").iterdir())
    assert results == ["atesd-0.json", "opsd-0.json"]
    result = json.loads((tmp_path / "results" / "learning_curves" / "opsd-0.json").read_text())
    assert {row["alpha"] for row in result["rows"]} == {1.0} and result["start"] != result["end"]
    text = table.render("learning_curves")
    assert "| ATESD, seed 0, 2 steps |" in text and f"{result['end']['token_kl']:.3f}" in text
