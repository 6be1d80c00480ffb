"""What can be foreseen before the first step: steps that train nothing, and a disk that is too small."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from atesd.config import ATESDConfig


def warm_up_trains_nothing(config: ATESDConfig) -> str | None:
    """Returns a warning for a run all of whose steps are warm-up: its first step has a learning rate of 0."""
    if not config.max_steps <= config.warmup_steps:
        return None
    first = "its only step has" if config.max_steps == 1 else "step 1 has"
    return (
        f"max_steps is {config.max_steps} and warmup_steps {config.warmup_steps}: {first} a learning rate of 0, and no "
        "step the full one. Set --warmup_steps 0 for a short trial"
    )


def disk_is_too_small(config: ATESDConfig, run_dir: Path, trained: Iterable[Tensor]) -> str | None:
    """Returns a warning if the run's checkpoints will not fit on its disk.

    A checkpoint holds the trained weights, Adam's two moments and the weights once more as an adapter. One more than
    `save_total_limit` exist while the newest is written.
    """
    one = sum((4 if config.use_peft else 3) * p.numel() * p.element_size() for p in trained)
    needed = (config.save_total_limit + 1) * one
    free = shutil.disk_usage(run_dir).free
    if needed <= free:
        return None
    return (
        f"{run_dir} has {free / 1e6:,.0f} MB free, and {config.save_total_limit + 1} checkpoints of about "
        f"{one / 1e6:,.0f} MB will not fit: choose another output_dir, or lower save_total_limit"
    )
