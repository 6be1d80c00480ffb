"""Launch parameters of the Triton kernels per architecture.

We chose the table from `compile_report` (registers, spills, shared memory, occupancy). On an H200 we timed twelve row
configurations (512 to 8,192 entries, 4 to 16 warps) for three losses: the table's is within 4 % of the best of each,
and no other is better for all three. There is no autotuning at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowConfig:
    """Launch of a row kernel. `block` is the number of vocabulary entries a program loads at once. Four entries per
    thread give a 16-byte load of fp32 S and an 8-byte load of 16-bit D; eight double registers and halve occupancy."""

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
    "gfx942": RowConfig(1024, 4),  # a warp has 64 threads
}
INTERPRETED = RowConfig(1024, 4)


@dataclass(frozen=True)
class TileConfig:
    """Launch of the tile kernel. A tile has `block_m` rows and `block_n` vocabulary entries; a step covers `block_k` of
    the hidden size. `tma` reads an aligned head through a tensor descriptor (sm_90 and later)."""

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


# The kernel computes one product and running statistics. `compile_report` shows that spilling limits its tiles. No TMA:
# with one model it takes more registers than address arithmetic.
TILES = {
    **dict.fromkeys(("sm_80", "sm_90"), TileConfig(128, 64, 64, 8, 3)),
    "sm_100": TileConfig(128, 64, 64, 8, 2),
    "gfx942": TileConfig(128, 64, 32, 8, 1),
}
INTERPRETED_TILE = TileConfig(16, 256, 64, 4, 1)
PROGRAMS_PER_PROCESSOR = 4  # enough to hide a row kernel's memory latency


@functools.lru_cache
def architecture(device: torch.device) -> str | None:
    """Returns the GPU's key in the table, or the nearest older key if it is not listed; None without a GPU."""
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
    """Returns the number of programs per row: a power of two, and 1 if the rows alone fill the GPU."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // max(rows, 1)
    return 1 << (max(1, min(wanted, -(-vocab // block), 64)).bit_length() - 1)


def tile_config(device: torch.device, dtype: torch.dtype) -> TileConfig:
    config = TILES.get(architecture(device), INTERPRETED_TILE)
    # fp32 operands take twice the shared memory
    return config if dtype.itemsize == 2 else replace(config, block_k=config.block_k // 2)


def tile_splits(rows: int, columns: int, config: TileConfig, device: torch.device) -> int:
    """Returns the number of programs that share a tile of rows: a power of two that occupies every processor."""
    wanted = 2 * num_processors(device) // max(1, -(-rows // config.block_m))
    return 1 << (max(1, min(wanted, -(-columns // config.block_n), 64)).bit_length() - 1)
