"""Opt-in timing of tile sizes: `ATESD_AUTOTUNE=1`. Separate from `tuning.py`, whose table needs no GPU and no wait.

A handful of neighbours of the table's entry that fit the GPU's shared memory are timed on the first call of each kind
(kernel, architecture, dtype, hidden size, vocabulary, kind of head) and the fastest is remembered in a file, so that a
machine waits once. Timing waits for the device: warm up before capturing a CUDA graph. Row kernels are not tuned, their
time is memory traffic. Which rows of a call share a program changes with the sizes, so results change by rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .tuning import TileConfig

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def enabled() -> bool:
    return os.environ.get("ATESD_AUTOTUNE") == "1"


def cache_file() -> Path:
    """`tile_sizes.json` in $ATESD_CACHE_DIR, by default ~/.cache/atesd_kernels."""
    return Path(os.environ.get("ATESD_CACHE_DIR") or Path.home() / ".cache" / "atesd_kernels") / "tile_sizes.json"


def candidates(default: TileConfig, arch: str, itemsize: int, operands: int) -> list[TileConfig]:
    """The table's entry and its neighbours: wider and narrower tiles, half the warps, one stage more or less, and
    the head read the other way (TMA or addresses).

    `operands` blocks of A's rows and one of W's columns are kept in shared memory per stage.
    """
    found = [default]
    for block_n in (default.block_n // 2, default.block_n, default.block_n * 2):
        for num_warps in (default.num_warps // 2, default.num_warps):
            for num_stages in (default.num_stages - 1, default.num_stages, default.num_stages + 1):
                config = replace(default, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
                shared = num_stages * config.block_k * itemsize * (operands * config.block_m + block_n)
                sane = block_n >= 16 and num_warps >= 4 and num_stages >= 1
                if sane and shared <= SHARED_BYTES[arch] and config not in found:
                    found.append(config)
    if arch in ("sm_90", "sm_100"):
        found.append(replace(default, tma=not default.tma))
    return found


def fastest(
    key: str,
    configs: list[TileConfig],
    launch: Callable[[TileConfig], None],
    milliseconds: Callable[[Callable[[], None]], float] | None = None,
) -> TileConfig:
    """The config remembered for `key`, or else the one whose `launch` takes the least time, which is then remembered.

    A config that does not run on this GPU (registers, shared memory) is passed over; the first is the default, and what
    is taken while a CUDA graph is being captured.
    """
    path = cache_file()
    known = json.loads(path.read_text()) if path.exists() else {}
    if key in known:
        return TileConfig(**known[key])
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return configs[0]
    if milliseconds is None:
        from triton.testing import do_bench

        milliseconds = do_bench
    times = {}
    for config in configs:
        try:
            times[config] = milliseconds(lambda config=config: launch(config))
        except Exception as error:  # Triton's OutOfResources, or the driver's refusal; the default's is not hidden
            if config is configs[0]:
                raise
            del error
    best = min(times, key=times.__getitem__)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(known | {key: asdict(best)}, indent=1))
    written.replace(path)  # whole or not at all, also when several processes tune
    return best
