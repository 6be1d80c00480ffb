"""Atomic checkpoints: written to a staging folder, flushed to disk, renamed; only then older ones are removed.

If the process is killed or the disk fills up at any moment, the previous checkpoint stays valid. A checkpoint folder,
e.g. RUN_DIR/checkpoints/step-000012, holds `state.pt`, `settings.json`, `adapter/` in peft's format, and
`manifest.json` with a digest of each file. A step that is saved again becomes step-000012.2.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from atesd.errors import AtesdError
from atesd.files import fsync, storage_fault
from atesd.stopping import go_on_command
from atesd.storage.manifest import MANIFEST, damage, write_manifest

CHECKPOINTS = "checkpoints"
STATE, SETTINGS = "state.pt", "settings.json"
NAME = re.compile(r"step-(\d{6,})(?:\.(\d+))?")
STAGING = ".writing-"
PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size)


class CheckpointError(AtesdError, RuntimeError):
    """A checkpoint cannot be written or read. The message says which one is still valid, and what to do."""


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    payload: dict[str, Any],
    adapter_writer: Callable[[Path], None] | None,
    keep: int,
    proven_step: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Writes RUN_DIR/checkpoints/step-<step> and removes all but the latest `keep`. Returns the new folder.

    Args:
        payload: tensors, state dicts and plain values (numbers, strings, dicts, lists, tuples). Other types raise
            TypeError here rather than at resume.
        adapter_writer: writes the adapter to the folder it is given, e.g. `model.save_pretrained`. None: no adapter.
        keep: number of checkpoints to keep, at least 1. Old ones are removed only after the new one is complete.
        proven_step: the newest checkpoint up to this step is kept beside them: its weights are known to be good.
        settings: the run's, for `settings.json`, which can be read without the state.

    Raises:
        CheckpointError: the storage fails. The previous checkpoint stays valid, and the partial new one is removed.
        TypeError: a payload value has a type that could not be loaded back. The message names it.
    """
    for place, kind in unreadable(payload, "payload"):
        raise TypeError(
            f"{place} is a {kind}; a checkpoint holds tensors, numbers, strings, dicts, lists and tuples: convert it "
            f"(numpy arrays with .tolist() or torch.from_numpy)"
        )
    folder = Path(run_dir) / CHECKPOINTS
    staging = folder / f"{STAGING}step-{step:06d}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)
        remove_leftovers(folder)
        staging.mkdir()
        write(staging, payload, adapter_writer, settings or {})
        final = free_name(folder, step)
        staging.rename(final)
        fsync(folder)
    except Exception as error:  # remove the partial checkpoint, then re-raise
        shutil.rmtree(staging, ignore_errors=True)
        fault = storage_fault(error)
        if fault is None:
            raise
        previous = latest_checkpoint(run_dir)
        kept = f"{previous} is complete and valid" if previous else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{fault} at {folder}: the checkpoint of step {step} could not be written. {kept}. "
            f"Mend that (free some space, or make it writable), then go on with: {go_on_command(run_dir)}"
        ) from error
    remove_old(run_dir, final, keep, proven_step)
    return final


def write(
    staging: Path, payload: dict[str, Any], adapter_writer: Callable[[Path], None] | None, settings: dict[str, Any]
) -> None:
    """Writes all files of a checkpoint, and waits until they are on the device."""
    # Pass a file object, not a path: torch then propagates the operating system's error.
    with (staging / STATE).open("wb") as file:
        torch.save(payload, file)
    if adapter_writer is not None:
        adapter_writer(staging / "adapter")
    (staging / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    write_manifest(staging)
    for path in [*staging.rglob("*"), staging]:
        fsync(path)


def free_name(folder: Path, step: int) -> Path:
    """A name after those that the step has had: its earlier checkpoint stays until the new one is there."""
    name = f"step-{step:06d}"
    matches = (NAME.fullmatch(path.name) for path in folder.glob(f"{name}*"))
    taken = [int(match[2] or 1) for match in matches if match and int(match[1]) == step]
    return folder / (f"{name}.{max(taken) + 1}" if taken else name)


def remove_old(run_dir: str | os.PathLike[str], new: Path, keep: int, proven_step: int | None) -> None:
    """Removes other checkpoints of the new one's step, and all but the latest `keep` steps and the proven one."""
    checkpoints = dict(list_checkpoints(run_dir))  # the last of each step
    kept = [*checkpoints.values()][-max(1, keep) :] + [new]
    kept += [path for step, path in checkpoints.items() if proven_step is not None and step <= proven_step][-1:]
    for _, path in list_checkpoints(run_dir):
        if path not in kept:  # rename before removal: a partly removed folder must not look like a checkpoint
            path.rename(path.with_name(f"{STAGING}old-{path.name}"))
    remove_leftovers(new.parent)


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None. Ignores partial ones, left by a kill."""
    found = list_checkpoints(run_dir)
    return found[-1][1] if found else None


def newest_whole_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, str]]:
    """Returns the newest checkpoint whose files are as they were written, and what is wrong with each newer one."""
    damaged = {}
    for _, path in reversed(list_checkpoints(run_dir)):
        if (fault := damage(path)) is None:
            return path, damaged
        damaged[path] = fault
    return None, damaged


def load_checkpoint(path: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """Returns the payload of a checkpoint, with tensors on the CPU. Runs no code from the file (`weights_only`).

    Args:
        verify: compare the files with the manifest first.

    Raises:
        CheckpointError: `path` holds no checkpoint, or a damaged one.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no {STATE}. A run has them in RUN_DIR/{CHECKPOINTS}")
    if verify and (fault := damage(Path(path))):
        raise CheckpointError(f"{path} is damaged: {fault}. Delete it to resume from the one before it")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete {path} to resume from the one before it") from error


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Returns (step, path) of every complete checkpoint, oldest first. Partial ones do not have a step-<step> name."""
    paths = (Path(run_dir) / CHECKPOINTS).glob("step-*")
    complete = (path for path in paths if (path / MANIFEST).is_file() or (path / STATE).is_file())
    named = ((NAME.fullmatch(path.name), path) for path in complete)
    found = sorted((int(match[1]), int(match[2] or 1), path) for match, path in named if match)
    return [(step, path) for step, _, path in found]


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's name tells; 0 for another name."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def set_aside(path: Path, why: str) -> Path:
    """Renames a checkpoint, so that it is kept and no longer resumed from. Returns its new path."""
    number, target = 1, path.with_name(f"{why}-{path.name}")
    while target.exists():
        number, target = number + 1, path.with_name(f"{why}-{path.name}-{number + 1}")
    return path.rename(target)


def remove_leftovers(folder: Path) -> None:
    """Removes partial checkpoints of a killed process, and old checkpoints. Leaves files: a checkpoint is a folder."""
    for path in folder.glob(f"{STAGING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def unreadable(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yields (place, type name) of each value that `torch.load(weights_only=True)` would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from unreadable(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            yield from unreadable(item, f"{place}[{index}]")
    elif type(value) not in PLAIN and not isinstance(value, torch.Tensor):
        yield place, type(value).__name__
