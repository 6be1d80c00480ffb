"""A checkpoint is whole or absent, whatever happens while it is written."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from atesd.storage import checkpoint
from atesd.storage.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
    set_aside,
)


def payload(step):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "pending": [{"alpha": 0.5, "rewards": (1.0, 2.0)}],
        "name": "run",
        "none": None,
    }


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = payload(3)
    path = save_checkpoint(tmp_path, 3, saved, lambda folder: folder.mkdir(), keep=2)
    assert path == tmp_path / "checkpoints" / "step-000003" == latest_checkpoint(tmp_path)
    assert (path / "adapter").is_dir()
    loaded = load_checkpoint(path)
    assert loaded["pending"] == saved["pending"] and loaded["none"] is None
    torch.testing.assert_close(loaded["model"], dict(saved["model"]), rtol=0, atol=0)
    torch.testing.assert_close(loaded["optimizer"]["state"][0], saved["optimizer"]["state"][0], rtol=0, atol=0)
    assert torch.equal(loaded["rng"], saved["rng"])


def test_the_last_k_are_kept_in_the_order_of_steps(tmp_path):
    for step in (8, 9, 10, 1_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, None, keep=2)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": 1}, None, keep=1)
    save_checkpoint(tmp_path, 1, {"x": 2}, None, keep=1)
    assert names(tmp_path) == ["step-000001.2"]
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"x": 2}


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_checkpoint(tmp_path)


def test_half_written_checkpoints_are_ignored_and_cleaned(tmp_path):
    good = save_checkpoint(tmp_path, 1, {"x": 1}, None, keep=3)
    half = tmp_path / "checkpoints" / ".writing-step-000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step-000009").mkdir()  # a folder somebody emptied
    assert latest_checkpoint(tmp_path) == good
    save_checkpoint(tmp_path, 2, {"x": 2}, None, keep=3)
    assert not half.exists()
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"x": 2}


def test_a_damaged_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.ones(1000)}, None, keep=1)
    content = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"step-000001 is damaged: state\.pt has changed"):
        load_checkpoint(path)


def test_a_value_that_could_not_be_read_back_is_refused_when_saving(tmp_path):
    with pytest.raises(TypeError, match=r"payload\['rng'\]\[1\] is a Random"):
        import random

        save_checkpoint(tmp_path, 1, {"rng": [0, random.Random()]}, None, keep=1)
    assert latest_checkpoint(tmp_path) is None


def full_while_fsync(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def full_while_writing(monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def open_on_full_disk(path, mode="r", **rest):
        file = opened(path, mode, **rest)
        return FullDisk(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", open_on_full_disk)


@pytest.mark.parametrize("failure", [full_while_writing, full_while_fsync])
def test_a_full_disk_leaves_the_previous_checkpoint_valid_and_tells_what_to_do(tmp_path, monkeypatch, failure):
    previous = save_checkpoint(tmp_path, 1, payload(1), None, keep=1)
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(CheckpointError) as refusal:
            save_checkpoint(tmp_path, 2, payload(2), None, keep=1)
    message = str(refusal.value)
    assert "is full" in message and str(previous) in message and f"--resume {tmp_path}" in message
    assert names(tmp_path) == ["step-000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs needs root; the simulated full disk above covers the same path")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("where", ["state", "adapter"])
def test_a_disk_that_is_really_full_leaves_the_previous_checkpoint_valid(small_disk, where):
    from safetensors.torch import save_file

    big = torch.randn(600_000)  # 2.4 MB

    def write_adapter(folder):
        folder.mkdir()
        save_file({"a": big}, folder / "adapter.safetensors")

    previous = save_checkpoint(small_disk, 1, {"x": torch.ones(10)}, None, keep=1)
    state, adapter = ({"x": big}, None) if where == "state" else ({"x": 2}, write_adapter)
    with pytest.raises(CheckpointError, match="is full"):
        save_checkpoint(small_disk, 2, state, adapter, keep=1)
    assert latest_checkpoint(small_disk) == previous
    assert torch.equal(load_checkpoint(previous)["x"], torch.ones(10))
    save_checkpoint(small_disk, 3, {"x": 3}, None, keep=1)  # nothing of the failed one is in the way
    assert names(small_disk) == ["step-000003"]


def test_other_errors_are_passed_on_and_leave_nothing_behind(tmp_path):
    def broken(folder):
        raise KeyError("adapter")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, 1, {"x": 1}, broken, keep=1)
    assert names(tmp_path) == []


KILLED = """
import sys, torch
from atesd.storage.checkpoint import save_checkpoint
for step in range(1, 10_000):
    save_checkpoint(sys.argv[1], step, {"step": step, "x": torch.full((200_000,), float(step))}, None, keep=2)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.03 + 0.017 * attempt)
        process.send_signal(signal.SIGKILL)
        finished = [int(line) for line in process.communicate()[0].split()]
        loaded = load_checkpoint(latest_checkpoint(tmp_path))
        assert torch.equal(loaded["x"], torch.full((200_000,), float(loaded["step"])))
        assert loaded["step"] >= (finished[-1] if finished else 1)
        checkpoint.remove_leftovers(tmp_path / "checkpoints")
        assert 1 <= len(names(tmp_path)) <= 3
        shutil.rmtree(tmp_path / "checkpoints")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it, and nothing is cleaned up after it."""


def killed_before(monkeypatch, number):
    """Every call that changes a name counts; before call `number`, and at every call after it, the process is dead."""
    calls = []
    for name in ("rename", "replace", "unlink", "rmdir", "remove"):

        def counted(call, *arguments, **rest):
            calls.append(call)
            if len(calls) >= number:
                raise Killed
            return call(*arguments, **rest)

        monkeypatch.setattr(os, name, partial(counted, getattr(os, name)))
    return calls


def test_there_is_never_a_moment_without_a_whole_checkpoint_of_the_newest_step(tmp_path, monkeypatch):
    def adapter(folder):
        folder.mkdir()
        (folder / "adapter.bin").write_bytes(b"x")

    number, finished = 1, False
    while not finished:
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        for step in (1, 2, 2):  # the last one replaces a checkpoint, and one is due for removal
            save_checkpoint(run_dir, step, {"step": step, "x": "old"}, adapter, keep=2)
        with monkeypatch.context() as patch:
            calls = killed_before(patch, number)
            try:
                save_checkpoint(run_dir, 2, {"step": 2, "x": "new"}, adapter, keep=1)
                finished = True
            except Killed:
                pass
        path, damaged = newest_whole_checkpoint(run_dir)
        assert not damaged and load_checkpoint(path)["step"] == 2
        if len(calls) > 1:
            assert load_checkpoint(path)["x"] == "new", "the first change of a name puts the new one there"
        save_checkpoint(run_dir, 3, {"step": 3}, None, keep=1)
        assert names(run_dir) == ["step-000003"], "the next save clears what the killed one left"
        number += 1
    assert number > 5, "renames and removals were counted"


def test_no_flipped_bit_is_loaded(tmp_path):
    def adapter(folder):
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"r": 4}')

    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(3.0), "alpha": 0.25}, adapter, keep=1)
    loaded_anyway = 0
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            try:
                payload = load_checkpoint(path)
            except CheckpointError:
                continue
            assert file.name == "manifest.json"  # white space and the like
            assert payload["alpha"] == 0.25 and torch.equal(payload["x"], torch.arange(3.0))
            loaded_anyway += 1
        file.write_bytes(content)
    assert loaded_anyway < 10
    assert load_checkpoint(path)["alpha"] == 0.25


@pytest.mark.parametrize("missing", ["state.pt", "manifest.json", "adapter/adapter.bin"])
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_found(tmp_path, missing):
    def adapter(folder):
        folder.mkdir()
        (folder / "adapter.bin").write_bytes(b"x")

    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, adapter, keep=3)
    for _, path in list_checkpoints(tmp_path)[1:]:
        (path / missing).unlink()
    path, damaged = newest_whole_checkpoint(tmp_path)
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in damaged] == ["step-000003", "step-000002"] and all(
        missing in fault for fault in damaged.values()
    )


def test_a_checkpoint_set_aside_is_kept_and_not_found(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, None, keep=3)
    for _ in range(2):
        aside = set_aside(save_checkpoint(tmp_path, 2, {"step": 2}, None, keep=3), "diverged")
        assert load_checkpoint(aside)["step"] == 2
    assert names(tmp_path) == ["diverged-step-000002", "diverged-step-000002-2", "step-000001"]
    assert latest_checkpoint(tmp_path).name == "step-000001"


def test_the_proven_checkpoint_outlives_the_last_k(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"step": step}, None, keep=1, proven_step=min(step - 1, 2))
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_a_file_that_has_the_name_of_a_partial_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".writing-notes").write_text("mine")
    save_checkpoint(tmp_path, 1, {"step": 1}, None, keep=1)
    assert (tmp_path / "checkpoints" / ".writing-notes").read_text() == "mine"
