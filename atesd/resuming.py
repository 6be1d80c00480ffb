"""What a run that goes on starts from: its newest whole checkpoint, which must fit the settings it goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from atesd.config import CONFIG_FILE, ATESDConfig
from atesd.config.checks import check_same_settings
from atesd.config.fields import MAY_CHANGE
from atesd.config.load import settings_of_run
from atesd.errors import AtesdError, StorageError
from atesd.files import storage_fault
from atesd.reports.metrics import METRICS, folder_gone, read_steps
from atesd.stopping import go_on_command
from atesd.storage.checkpoint import (
    CHECKPOINTS,
    SETTINGS,
    CheckpointError,
    list_checkpoints,
    newest_whole_checkpoint,
    set_aside,
)
from atesd.terminal import show

SUMMARY, NONFINITE = "summary.json", "nonfinite"
PROBLEMS_PER_STEP = "problems_per_step"  # in a checkpoint's settings, beside those of the run


class NonFiniteLoss(AtesdError, RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@contextmanager
def named_storage_faults(run_dir: Path) -> Iterator[None]:
    """Raises an error that says how to go on in place of whatever error the storage has caused within."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not run_dir.exists():
            raise folder_gone(run_dir, run_dir) from error
        if isinstance(error, AtesdError) or (fault := storage_fault(error)) is None:
            raise
        raise StorageError(
            f"{fault} ({error}); the last checkpoint is valid. Mend that, then go on with: {go_on_command(run_dir)}"
        ) from error


def checkpoint_to_resume(run_dir: Path, allow_older: bool) -> Path | None:
    """Returns the checkpoint that `--resume` takes; None if the run was stopped before it wrote one.

    A damaged checkpoint is renamed to damaged-<name>, and the newest whole one is taken.

    Raises:
        CheckpointError: the newest one is damaged and `allow_older` is off, or none is whole, or all are gone.
    """
    whole, damaged = newest_whole_checkpoint(run_dir)
    if damaged and (whole is None or not allow_older):
        found = "; ".join(f"{path}: {fault}" for path, fault in damaged.items())
        older = f"--allow_older_checkpoint goes on from {whole}" if whole else "no older one is whole"
        raise CheckpointError(f"damaged checkpoints: {found}. Restore the files from a copy; {older}")
    for path, fault in damaged.items():
        aside = set_aside(path, "damaged")
        show(f"{path} is damaged: {fault}. It is now {aside.name}, and the run goes on from {whole}")
    if whole is None and (gone := checkpoints_are_gone(run_dir)):
        raise CheckpointError(
            f"{run_dir} has no checkpoint to go on from, but {gone}: going on would start at step 1 and empty the "
            f"log. Restore {CHECKPOINTS}/ from a copy, or start a new run"
        )
    return whole


def checkpoints_are_gone(run_dir: Path) -> str | None:
    """Why a run without checkpoints must have had some; None if it may have been killed before its first."""
    if not (run_dir / CHECKPOINTS).is_dir() and (run_dir / METRICS).exists():
        return f"{CHECKPOINTS}/ is gone"
    if (run_dir / SUMMARY).exists():
        return "it has finished"
    save_steps = settings_of_run(run_dir).save_steps
    steps = max((row["step"] for row in read_steps(run_dir / METRICS)[0]), default=0)
    return f"it has logged {steps} steps and saved every {save_steps}" if steps > save_steps else None


def check_settings(checkpoint: Path, config: ATESDConfig, run_dir: Path, num_processes: int) -> None:
    """Raises ConfigError if `config` differs from the checkpoint's settings in what may not change.

    config.yaml can be edited by hand; a checkpoint knows what it was made with.
    """
    settings = json.loads((checkpoint / SETTINGS).read_bytes())
    saved = ATESDConfig(**{name: settings.get(name, value) for name, value in asdict(config).items()})
    may_change = [*MAY_CHANGE, "resume", "output_dir", "dry_run"]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
    if batch == settings.get(PROBLEMS_PER_STEP):  # the same batch on another number of processes
        may_change += ["per_device_train_batch_size", "gradient_accumulation_steps"]
    advice = f"undo an edit of {run_dir / CONFIG_FILE}, or start a new run. --resume may change {', '.join(MAY_CHANGE)}"
    check_same_settings(saved, config, may_change, f"the checkpoint in {str(run_dir)!r}", advice)


def finished_after(run_dir: Path) -> int | None:
    """Returns the steps after which the run wrote its results; None if it has not, or they cannot be read."""
    try:
        return int(json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def proven_step(step: int, nonfinite_in_a_row: int) -> int:
    """The last step whose weights are known to be good: the next update found loss and gradient finite."""
    return step - nonfinite_in_a_row - 1


def diverged(run_dir: Path, step: int, nonfinite_in_a_row: int) -> str:
    """Renames the checkpoints after the proven step to diverged-<name>. Returns what happened and how to go on."""
    proven = None
    for saved_step, path in list_checkpoints(run_dir):
        if saved_step <= proven_step(step, nonfinite_in_a_row):
            proven = path
        else:
            set_aside(path, "diverged")
    go_on = f"go on from {proven.name} with {go_on_command(run_dir)} and" if proven else "start again with"
    return (
        f"the rollouts, the loss or its gradient were not finite in {nonfinite_in_a_row} steps in a row "
        f"(the last is step {step}). The batches are in {run_dir / NONFINITE}; later checkpoints are "
        f"kept as diverged-*. To mend it, {go_on} a lower learning_rate or max_grad_norm"
    )
