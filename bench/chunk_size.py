"""Why the CPU's chunk, block and tile have the sizes they have.

    python -m bench.chunk_size [--tokens 1024] [--rounds 3]

Time of `linear_divergence` (forward KL, gradients for the hidden states) against `chunk_bytes`,
`planning.CPU_BLOCK_COLUMNS` and `planning.CPU_TILE_ROWS`, one varied at a time, interleaved.
"""

from __future__ import annotations

import argparse
from functools import partial

import atesd_kernels
from atesd_kernels import planning
from bench import timing
from bench.entrants import DTYPES, Inputs, value_and_grad
from bench.machine import markdown, save
from bench.smollm_states import solution_inputs

MIB = planning.MIB
CHUNK_MIB = (20, 40, 80, 160, 320)
BLOCK_COLUMNS = (2048, 4096, 8192)
TILE_ROWS = (16, 32, 64, 128, 10_000)
DEFAULT = (planning.DEFAULT_CHUNK_BYTES["cpu"] // MIB, planning.CPU_BLOCK_COLUMNS, planning.CPU_TILE_ROWS)


def configurations() -> list[tuple[int, int, int]]:
    chunk, columns, rows = DEFAULT
    varied = [(c, columns, rows) for c in CHUNK_MIB] + [(chunk, c, rows) for c in BLOCK_COLUMNS]
    return list(dict.fromkeys([DEFAULT, *varied, *((chunk, columns, r) for r in TILE_ROWS)]))


def with_sizes(x: Inputs, chunk: int, columns: int, rows: int) -> None:
    defaults = planning.CPU_BLOCK_COLUMNS, planning.CPU_TILE_ROWS
    planning.CPU_BLOCK_COLUMNS, planning.CPU_TILE_ROWS = columns, rows
    try:
        value_and_grad(
            lambda y: atesd_kernels.linear_divergence(y.student, y.weight, y.teacher, chunk_bytes=chunk * MIB), x
        )
    finally:
        planning.CPU_BLOCK_COLUMNS, planning.CPU_TILE_ROWS = defaults


def sizes(inputs: Inputs, rounds: int) -> list[dict]:
    rows = []
    for dtype in DTYPES:
        x = inputs.to(DTYPES[dtype])
        with_sizes(x, *DEFAULT)
        jobs = {sizes: partial(with_sizes, x, *sizes) for sizes in configurations()}
        for (chunk, columns, tile_rows), seconds in timing.interleave(jobs, rounds).items():
            row = {"dtype": dtype, "chunk_mib": chunk, "block_columns": columns, "tile_rows": tile_rows}
            rows.append({**row, **timing.summary(seconds)})
    return rows


def table(result: dict) -> str:
    header = ["chunk_bytes, block columns, tile rows", *(f"{d}, s" for d in DTYPES), *(f"{d}, range" for d in DTYPES)]
    seen: dict[tuple, dict] = {}
    for row in result["sizes"]:
        seen.setdefault((row["chunk_mib"], row["block_columns"], row["tile_rows"]), {})[row["dtype"]] = row
    rows = []
    for sizes, by_dtype in seen.items():
        chunk, columns, tile_rows = sizes
        name = f"{chunk} MiB, {columns:,}, {'all' if tile_rows >= 10_000 else tile_rows}"
        name += " (default)" if list(sizes) == result["default"] else ""
        medians = [f"{by_dtype[d]['median']:.2f}" for d in DTYPES]
        rows.append([name, *medians, *(f"{by_dtype[d]['min']:.2f} - {by_dtype[d]['max']:.2f}" for d in DTYPES)])
    return f"forward KL, N = {result['tokens']:,}:\n\n{markdown(header, rows)}"


def main(tokens: int = 1024, rounds: int = 3) -> dict:
    result = {"tokens": tokens, "default": list(DEFAULT), "sizes": sizes(solution_inputs(tokens), rounds)}
    print(table(result))
    save("chunk_size", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
