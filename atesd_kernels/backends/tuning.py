"""Launch parameters of the Triton kernels per architecture.

The table is chosen from what `compile_report` shows (registers, spills, shared memory, occupancy). On an H200 twelve
row configurations (512 to 8,192 entries, 4 to 16 warps) were timed for three losses: the table's is within 4 % of the
best of each, and no other is better for all. Nothing is measured or compiled twice at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowConfig:
    """A row kernel: vocabulary entries a program reads at once, and its warps. Four entries a thread are a 16-byte load
    of fp32 S and an 8-byte load of 16-bit D; eight cost twice the registers and half the occupancy."""

    block: int
    num_warps: int
    num_stages: int = 2

    @property
    def constants(self) -> dict[str, int]:
        return dict(BLOCK=self.block, num_warps=self.num_warps, num_stages=self.num_stages)


ROWS = {
    "sm_80": RowConfig(1024, 8),
    "sm_90": RowConfig(1024, 8, 1),
    "sm_100": RowConfig(1024, 8),
    "gfx942": RowConfig(1024, 4),  # 64 threads a warp
}
INTERPRETED = RowConfig(1024, 4)


@dataclass(frozen=True)
class TileConfig:
    """The tile kernel: rows and vocabulary entries of a tile, depth of a step over the hidden size; whether the head is
    read through a tensor descriptor (TMA, sm_90 and later) where its alignment allows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def constants(self) -> dict[str, int]:
        return dict(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


# One product and running statistics. The limit was spilling, as `compile_report` shows it. No TMA: over one model it
# takes more registers than computing addresses does.
TILES = {
    **dict.fromkeys(("sm_80", "sm_90"), TileConfig(128, 64, 64, 8, 3)),
    "sm_100": TileConfig(128, 64, 64, 8, 2),
    "gfx942": TileConfig(128, 64, 32, 8, 1),
}
INTERPRETED_TILE = TileConfig(16, 256, 64, 4, 1)
PROGRAMS_PER_PROCESSOR = 4  # what hides memory latency on a row kernel


@functools.lru_cache
def architecture(device: torch.device) -> str | None:
    """A key of the table; the nearest older entry for an architecture it does not list; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100" if properties.major >= 10 else "sm_80")


@functools.lru_cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 1


def row_config(device: torch.device, vocab: int) -> RowConfig:
    config = ROWS.get(architecture(device), INTERPRETED)
    return replace(config, block=min(config.block, max(128, 1 << (vocab - 1).bit_length())))


def row_splits(rows: int, vocab: int, block: int, device: torch.device) -> int:
    """Programs per row: a power of two, 1 as soon as the rows alone fill the GPU."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // max(rows, 1)
    return 1 << (max(1, min(wanted, -(-vocab // block), 64)).bit_length() - 1)


def tile_config(device: torch.device, dtype: torch.dtype) -> TileConfig:
    config = TILES.get(architecture(device), INTERPRETED_TILE)
    # fp32 operands take twice the shared memory
    return config if dtype.itemsize == 2 else replace(config, block_k=config.block_k // 2)


def tile_splits(rows: int, columns: int, config: TileConfig, device: torch.device) -> int:
    """Programs that share a tile of rows: a power of two, enough to give every processor work."""
    wanted = 2 * num_processors(device) // max(1, -(-rows // config.block_m))
    return 1 << (max(1, min(wanted, -(-columns // config.block_n), 64)).bit_length() - 1)
