"""Atomic checkpoints: written to a staging folder, flushed to disk, then renamed.

If the process is killed or the disk fills up at any moment, the previous checkpoint stays valid. A checkpoint folder,
e.g. RUN_DIR/checkpoints/step-000012, holds `state.pt`, and `adapter/` in peft's format.
"""

from __future__ import annotations

import errno
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

CHECKPOINTS = "checkpoints"
STATE = "state.pt"
NAME = re.compile(r"step-(\d{6,})")
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
) -> Path:
    """Writes RUN_DIR/checkpoints/step-<step> and removes all but the latest `keep`. Returns the new folder.

    Args:
        payload: tensors, state dicts and plain values (numbers, strings, dicts, lists, tuples). Other types raise
            TypeError here rather than at resume.
        adapter_writer: writes the adapter to the folder it is given, e.g. `model.save_pretrained`. None: no adapter.
        keep: number of checkpoints to keep, at least 1. Old ones are removed only after the new one is complete.

    Raises:
        CheckpointError: the disk is full. The previous checkpoint stays valid, and the partial new one is removed.
        TypeError: a payload value has a type that could not be loaded back. The message names it.
    """
    for place, kind in unreadable(payload, "payload"):
        raise TypeError(
            f"{place} is a {kind}; a checkpoint holds tensors, numbers, strings, dicts, lists and tuples: convert it "
            f"(numpy arrays with .tolist() or torch.from_numpy)"
        )
    folder = Path(run_dir) / CHECKPOINTS
    final = folder / f"step-{step:06d}"
    staging = folder / f"{STAGING}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        staging.mkdir()
        # Pass a file object, not a path: torch then propagates the operating system's error.
        with (staging / STATE).open("wb") as file:
            torch.save(payload, file)
        if adapter_writer is not None:
            adapter_writer(staging / "adapter")
        for path in [*(p for p in staging.rglob("*")), staging]:
            fsync(path)
        if final.exists():
            final.rename(folder / f"{STAGING}replaced-{final.name}")
        staging.rename(final)
        fsync(folder)
    except Exception as error:  # remove the partial checkpoint, then re-raise
        shutil.rmtree(staging, ignore_errors=True)
        if not is_full_disk(error):
            raise
        previous = latest_checkpoint(run_dir)
        kept = f"{previous} is complete and valid" if previous else "there is no earlier checkpoint"
        raise CheckpointError(
            f"the disk of {folder} is full: the checkpoint of step {step} could not be written. {kept}. "
            f"Free some space, then resume with: atesd train --resume {run_dir}"
        ) from error
    # Rename before removal: a partly removed folder must not look like a checkpoint.
    for _, old in list_checkpoints(run_dir)[: -max(1, keep)]:
        old.rename(folder / f"{STAGING}old-{old.name}")
    remove_leftovers(folder)
    return final


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None. Ignores partial ones, left by a kill."""
    found = list_checkpoints(run_dir)
    return found[-1][1] if found else None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the payload of a checkpoint, with tensors on the CPU. Runs no code from the file (`weights_only`).

    Raises:
        CheckpointError: `path` holds no checkpoint, or a damaged one.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no {STATE}. A run has them in RUN_DIR/{CHECKPOINTS}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete {path} to resume from the one before it") from error


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Returns (step, path) of every complete checkpoint, oldest first. Partial ones do not have a step-<step> name."""
    paths = (Path(run_dir) / CHECKPOINTS).glob("step-*")
    named = ((NAME.fullmatch(path.name), path) for path in paths if (path / STATE).is_file())
    return sorted((int(match.group(1)), path) for match, path in named if match)


def remove_leftovers(folder: Path) -> None:
    """Removes partial checkpoints of a killed process, and replaced or old checkpoints."""
    for path in folder.glob(f"{STAGING}*"):
        shutil.rmtree(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk or quota caused `error`. torch and safetensors wrap the operating system's error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


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
