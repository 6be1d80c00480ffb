"""Kill -9 at any moment, resume, and the metrics are those of the run that was not killed, to the last bit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from atesd.config import load_config
from atesd.storage.manifest import write_manifest
from atesd.trainer import train

STEPS = 7
NOT_COMPARED = ("seconds_", "tokens_per_second", "peak_memory_bytes")  # what depends on the machine's mood


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def start(start_atesd) -> Callable[..., subprocess.Popen]:
    return partial(start_atesd, "train")


@pytest.fixture
def kill_after(kill_when) -> Callable[[subprocess.Popen, Path, int], None]:
    """SIGKILL as soon as `steps` lines of metrics are there: the next step or a checkpoint is then under way.

    0 steps: as soon as there is a config.yaml, when nothing is loaded yet.
    """

    def kill(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
        kill_when(
            process,
            lambda: len(lines(run_dir / "metrics.jsonl")) >= steps and (run_dir / "config.yaml").exists(),
        )

    return kill


def compared(run_dir: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in lines(run_dir / name)]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in rows]


@pytest.fixture
def settings(tiny_config, tmp_path):
    """A run in which everything has a state: EMA teacher, dropout, decisions pending over checkpoints, two epochs."""
    config = tiny_config(
        max_steps=STEPS, save_steps=3, teacher="ema", ema_decay=0.9, lora_dropout=0.1, hold_window=2, lookahead=3,
        warmup_steps=3, lr_scheduler_type="cosine", num_train_problems=9, probe_every=2,
    )  # fmt: skip
    return str(config.save(tmp_path / "settings"))


def test_a_run_killed_four_times_ends_like_the_run_that_was_not(settings, tmp_path, start, kill_after):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(settings, "--output_dir", str(whole)))

    kill_after(start(settings, "--output_dir", str(broken)), broken, 0)
    assert {"config.yaml", "checkpoints", ".lock"} >= {p.name for p in broken.iterdir()}, "nothing was loaded yet"
    kill_after(start("--resume", str(broken)), broken, 1)  # before the first checkpoint
    kill_after(start("--resume", str(broken)), broken, 3)  # while the first is being written
    kill_after(start("--resume", str(broken)), broken, 5)  # between checkpoints
    finish(start("--resume", str(broken)))

    for name in ("metrics.jsonl", "samples.jsonl"):
        assert compared(broken, name) == compared(whole, name)
    assert [row["step"] for row in compared(whole, "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert (broken / "summary.json").read_text() == (whole / "summary.json").read_text()
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_finished_run_goes_on_when_given_more_steps_and_another_learning_rate(tiny_config):
    run_dir = train(tiny_config(max_steps=2, learning_rate=1e-3))
    train(load_config(None, ["--resume", str(run_dir), "--max_steps", "3", "--learning_rate", "1e-4"]))
    rows = compared(run_dir, "metrics.jsonl")
    assert [(row["step"], row["learning_rate"]) for row in rows] == [(1, 1e-3), (2, 1e-3), (3, 1e-4)]


def test_a_run_goes_on_from_any_folder_and_one_with_relative_paths_from_its_own(tiny_config, tmp_path, monkeypatch):
    """A run keeps its files by their full paths; one of an earlier version had them as they were typed."""
    rows = [{"problem": f"What is {i} + 1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(tiny_config(dataset_name="data.jsonl", max_steps=1))
    assert load_config(None, ["--resume", str(run)]).dataset_name == str(tmp_path / "home/data.jsonl")
    monkeypatch.chdir(tmp_path)
    assert len(lines(train(load_config(None, ["--resume", str(run), "--max_steps", "2"])) / "metrics.jsonl")) == 2

    monkeypatch.chdir(tmp_path / "home")
    for file in (run / "config.yaml", *run.glob("checkpoints/*/settings.json")):
        file.write_text(file.read_text().replace(str(tmp_path / "home/data.jsonl"), "data.jsonl"))
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
    assert len(lines(train(load_config(None, ["--resume", str(run), "--max_steps", "3"])) / "metrics.jsonl")) == 3
