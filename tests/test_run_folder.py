"""A run's folder: it has one owner, nobody makes it again when it is gone, and no start makes it unusable."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from atesd.config import ATESDConfig
from atesd.errors import ConfigError
from atesd.evaluation.training import TrainingEvaluation
from atesd.reports.metrics import RunFolderGone
from atesd.resuming import named_storage_faults
from atesd.run import Run
from atesd.storage.folder import OwnedFolder
from atesd.trainer import Trainer, train
from tests.run_logs import resume, rows_of


def test_a_live_run_is_neither_resumed_nor_hurt_by_a_second_process(tiny_config, start_atesd, kill_when):
    run = Run.build(tiny_config(max_steps=2))
    second = start_atesd("train", "--resume", str(run.run_dir))
    _, said = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"{run.run_dir} is being written by another process (process {os.getpid()}" in said.decode()
    Trainer(run).train()
    run.close()
    assert [row["step"] for row in rows_of(run.run_dir)] == [1, 2]
    with pytest.raises(ConfigError, match="already holds"):
        train(tiny_config(max_steps=2))


def test_a_run_gives_its_folder_up_however_it_ends(tiny_config, monkeypatch, start_atesd):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, t: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny_config(max_steps=1))
    run_dir = Path(tiny_config().output_dir)
    other = start_atesd("train", "--resume", str(run_dir))
    _, said = other.communicate(timeout=240)
    assert other.returncode == 0, said.decode()[-2000:]
    first, second = (Run.build(resume(run_dir)) for _ in range(2))  # in one process the newest owns it
    assert first.folder.lock is None and second.folder.lock is not None
    second.close()


def test_two_runs_started_in_the_same_second_have_two_folders(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(2):
        config = tiny_config(output_dir="runs/tiny-20261127-120000", max_steps=1)
        config.named_by_time = True
        folders.append(train(config))
    assert [folder.name for folder in folders] == ["tiny-20261127-120000", "tiny-20261127-120000-2"]
    assert all(yaml.safe_load((f / "config.yaml").read_text())["output_dir"] == str(f) for f in folders)


def test_a_run_whose_folder_is_removed_or_renamed_says_so_at_the_next_write(tiny_config, tmp_path, monkeypatch):
    step = Trainer.train_step

    def moved(self, t):
        if t == 1:
            self.run.run_dir.rename(tmp_path / "elsewhere")
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", moved)
    with pytest.raises(RunFolderGone, match=r"run/metrics\.jsonl is no longer where the run writes it"):
        train(tiny_config())
    assert not (tmp_path / "run").exists(), "nothing is written where nobody looks"


@pytest.mark.parametrize("place", ["save", "measure", "write_best", "finish", "save_nonfinite_batch"])
def test_no_writer_of_a_run_makes_a_removed_folder_again(tiny_config, monkeypatch, place):
    owner = TrainingEvaluation if place == "measure" else Run
    write = getattr(owner, place)

    def removed(self, *arguments, **numbers):
        if self is not run.evaluation or arguments[0]:  # not the evaluation before the first step
            shutil.rmtree(run.run_dir)
        return write(self, *arguments, **numbers)

    monkeypatch.setattr(owner, place, removed)
    config = tiny_config(max_steps=2, save_steps=1, eval_steps=1, num_eval_problems=2, save_best=True)
    config.max_nonfinite_steps = 1
    run = Run.build(config)
    if place == "save_nonfinite_batch":
        monkeypatch.setattr(run.student, "step", lambda loss: None)
    gone = pytest.raises(RunFolderGone, match="no longer where the run writes it")
    with closing(run), gone, named_storage_faults(run.run_dir):
        Trainer(run).train()
    assert not run.run_dir.exists()


@pytest.mark.parametrize("after", ["own_folder", "save"])
def test_a_start_killed_before_anything_was_trained_leaves_a_name_that_can_be_used(tiny_config, monkeypatch, after):
    """Either the folder can be taken by a new run, or the run in it can be resumed."""
    owner = Run if after == "own_folder" else ATESDConfig
    write = getattr(owner, after)

    def killed(self, *arguments):
        write(self, *arguments)
        if after == "own_folder":
            self.folder.close()
        raise SystemExit

    config = tiny_config(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, after, killed)
        patch.setattr(OwnedFolder, "discard", lambda *_: None)  # a kill clears nothing
        with pytest.raises(SystemExit):
            train(config)
    run_dir = Path(config.output_dir)
    assert run_dir.is_dir() and not (run_dir / "checkpoints").exists()
    step = Trainer.train_step

    def killed_again(self, t):
        if t == 1:
            raise SystemExit
        return step(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed_again)
        with pytest.raises(SystemExit):
            train(tiny_config(max_steps=2) if after == "own_folder" else resume(run_dir, "--max_steps", "2"))
    train(resume(run_dir))
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2]


@pytest.mark.parametrize("name", [".writing-adapter", ".replaced-adapter", ".writing-best"])
def test_stray_files_under_the_names_of_staging_folders_give_way(tiny_config, name):
    config = tiny_config(max_steps=1, save_best=True)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / name).write_text("left by somebody")
    run_dir = train(config)
    assert (run_dir / "adapter").is_dir() and not (run_dir / name).exists()
