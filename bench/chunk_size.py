"""Why the CPU's chunk, block and tile have the sizes they have, and why its elementwise passes need no compiler.

    python -m bench.chunk_size [--tokens 1024] [--rounds 3] [--only sizes|compile]

1. Time of `linear_divergence` (forward KL, gradients for the hidden states) against `chunk_bytes`,
   `planning.CPU_BLOCK_COLUMNS` and `planning.CPU_TILE_ROWS`, one varied at a time, interleaved.
2. The elementwise passes of that op alone, in nanoseconds per pair of logits: eager tile by tile, eager over whole
   blocks, and the same lines under `torch.compile`, with the seconds it takes to compile.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

import atesd_kernels
from atesd_kernels import planning
from atesd_kernels.divergences import get_divergence
from bench import timing
from bench.entrants import DTYPES, Inputs, value_and_grad
from bench.machine import markdown, save
from bench.smollm_states import solution_inputs

MIB = planning.MIB
CHUNK_MIB = (20, 40, 80, 160, 320)
BLOCK_COLUMNS = (1024, 2048, 4096, 8192, 16_384, 49_152)
TILE_ROWS = (8, 16, 32, 64, 128, 10_000)
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


def normalise(s: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First sweep: softmax within the block (over the logits), its lse and mean difference; whether all are near."""
    d = d.float()
    near = torch.maximum(d.amax(), -d.amin())
    q = torch.softmax(s, 1)
    lse, mean = s.amax(1) - q.amax(1).log(), torch.linalg.vecdot(q, d)
    s.copy_(q)
    return lse, mean, near


def excess(q: Tensor, d: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
    """Second sweep: what c needs."""
    return torch.linalg.vecdot(q * rho[:, None], (d.float() - mean[:, None]).expm1_())


def gradient(q: Tensor, d: Tensor, rho: Tensor, c: Tensor, sum_u: Tensor) -> Tensor:
    """Third sweep: divergence, and the gradient in the place of the difference."""
    q, x = q * rho[:, None], d.float() - c[:, None]
    l, u = get_divergence("forward_kl", 0.0).centred(x, q, 0.0)
    d.copy_(torch.addcmul(u, q, sum_u[:, None], value=-1))
    return l.sum(1)


SWEEPS = (normalise, excess, gradient)


def sweep_all(sweeps, blocks: list[tuple[Tensor, Tensor]], vectors: list[Tensor], tile_rows: int) -> None:
    """The sweeps one after another, each over all blocks, tile by tile: what they hand each other is per row."""
    rho, mean, c, sum_u = vectors
    with torch.no_grad():
        for sweep, extra in zip(sweeps, ((), (rho, mean), (rho, c, sum_u)), strict=True):
            for s, d in blocks:
                for i in range(0, len(s), tile_rows):
                    tile = slice(i, i + tile_rows)
                    sweep(s[tile], d[tile], *(v[tile] for v in extra))


def compile_or_not(rounds: int, rows: int = 256, columns: int = 4096, num_blocks: int = 12) -> list[dict]:
    """A chunk of `rows` rows of a 49,152-token vocabulary: too large for the cache, as in the op."""
    result = []
    tile = DEFAULT[2]
    for dtype in DTYPES:
        torch.manual_seed(0)
        like = DTYPES[dtype]
        blocks = [
            (torch.randn(rows, columns), torch.randn(rows, columns).mul_(0.1).to(like)) for _ in range(num_blocks)
        ]
        vectors = [torch.full((rows,), value) for value in (1 / num_blocks, 0.0, 1e-3, 1e-3)]
        forms, first = {}, {}
        for name, tile_rows in ((f"tiles of {tile} rows", tile), ("whole blocks", rows)):
            for how in ("eager", "torch.compile"):
                torch._dynamo.reset()
                sweeps = SWEEPS if how == "eager" else [torch.compile(f, dynamic=False) for f in SWEEPS]
                form = forms[f"{how}, {name}"] = partial(sweep_all, sweeps, blocks, vectors, tile_rows)
                first[f"{how}, {name}"] = timing.timed(form)[0]
        for name, seconds in timing.interleave(forms, max(rounds, 5)).items():
            per_pair = [1e9 * wall / (rows * columns * num_blocks) for wall, _ in seconds]
            row = {"form": name, "dtype": dtype, "ns_per_pair": statistics.median(per_pair)}
            result.append({**row, "min": min(per_pair), "max": max(per_pair), "first_call_seconds": first[name]})
    return result


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
    blocks = [f"forward KL, N = {result['tokens']:,}:\n\n{markdown(header, rows)}"] if rows else []
    if result["compile"]:
        by_form: dict[str, dict] = {}
        for row in result["compile"]:
            by_form.setdefault(row["form"], {})[row["dtype"]] = row
        header = ["elementwise passes", *(f"ns per pair, {d}" for d in DTYPES), "first call, s"]
        rows = []
        for form, r in by_form.items():
            first = max(row["first_call_seconds"] for row in r.values())
            rows.append([form, *(f"{r[d]['ns_per_pair']:.1f}" for d in DTYPES), f"{first:.1f}"])
        blocks.append(markdown(header, rows))
    return "\n\n".join(blocks)


def main(tokens: int = 1024, rounds: int = 3, only: str | None = None) -> dict:
    result = {"tokens": tokens, "default": list(DEFAULT), "sizes": [], "compile": []}
    if only != "compile":
        result["sizes"] = sizes(solution_inputs(tokens), rounds)
    if only != "sizes":
        result["compile"] = compile_or_not(rounds)
    print(table(result))
    if only is None:
        save("chunk_size", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("sizes", "compile"))
    main(**vars(parser.parse_args()))
