"""Extra peak memory of forward + backward to the hidden states, over the number of tokens.

    python -m bench.memory [--full] [--dtype fp32]

Without `--full` the peers are measured at the two smaller sizes only: at the largest they take minutes each. Each
figure comes from a process of its own: inputs made, one warm-up call (libraries load, compilers compile), freed memory
handed back to the system, then the peak resident set of one call less the resident set before it; on a GPU, what the
allocator says. The gradient that the call returns, N x H, is included. H = 576 and V = 49,152 are SmolLM2-135M's; on a
GPU the shapes are Qwen3's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.entrants import COMPILED, DEVICE, DTYPES, LIGER_EAGER, OURS, missing, names
from bench.machine import ROOT, markdown, save
from bench.plots import Line, log_log
from bench.progress import say
from bench.shapes import HERE, SHAPES, Shape

WARM_UP, COMPILED_WARM_UP = 256, 1024  # the compiled Liger compiles for its chunk of 1,024 rows
TOKENS = (1024, 4096, 16_384)
LOSS = "forward_kl"
MIB = 2**20
HEADROOM = 0.7  # of the free memory: what a run may be expected to take
START_UP = 15  # seconds of a process before its call, or so
PATIENCE = 240  # seconds a run may be expected to take: bf16 on a processor without instructions for it takes hours


def entrants_measured(compiled: bool) -> list[str]:
    """Everyone with this loss; Liger as it comes, or eager where nobody waits for a compiler."""
    left_out = {LIGER_EAGER, f"{OURS}, compiled", "dense torch, compiled"} if compiled else COMPILED
    return [name for name in names(LOSS) if name not in left_out]


def child(name: str, dtype: str, tokens: int, shape: Shape) -> float:
    """Extra peak bytes in this process."""
    import torch

    from bench.entrants import Inputs, entrant, value_and_grad

    torch.manual_seed(0)
    student = torch.randn(tokens, shape.hidden)
    teacher = student + 0.1 * torch.randn(tokens, shape.hidden)
    head = torch.randn(shape.vocab, shape.hidden) * 0.1
    x = Inputs(student, head, teacher, torch.randint(shape.vocab, (tokens,))).to(DTYPES[dtype]).on(DEVICE)
    del student, teacher, head
    function = entrant(name, LOSS)
    value_and_grad(function, x.rows(slice(COMPILED_WARM_UP if name in COMPILED else WARM_UP)))
    extra, result = extra_peak(lambda: value_and_grad(function, x))
    assert torch.isfinite(result[1]).all()
    return extra


def extra_peak(function: Callable) -> tuple[int, object]:
    """Bytes of the peak beyond what is there before the call, and what it returns."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, dtype: str, tokens: int, shape: Shape) -> dict:
    command = [sys.executable, "-m", "bench.memory", "--child", name, dtype, str(tokens), shape.name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        tail = run.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"not_run": f"ended with status {run.returncode}: {tail[0][:200]}"}
    return {"extra_bytes": json.loads(run.stdout.splitlines()[-1])}


def run(
    tokens: tuple[int, ...] = TOKENS,
    peers: tuple[int, ...] = TOKENS,
    compiled: bool = True,
    shape: Shape = HERE[0],
    dtypes: Iterable[str] = tuple(DTYPES),
) -> dict:
    """This library at all `tokens`, peers at those that are among `peers`. Saved after every figure."""
    rows: list[dict] = []
    result = {"hidden": shape.hidden, "vocab": shape.vocab, "tokens": list(tokens), "rows": rows}
    for dtype in dtypes:
        for name in entrants_measured(compiled):
            seen: list[tuple[int, int]] = []
            seconds_a_token = 0.0
            for n in tokens:
                row = {"entrant": name, "dtype": dtype, "tokens": n}
                needed = seen[-1][1] * n / seen[-1][0] if len(seen) > 1 and growing(seen) else 0
                if missing(name):
                    row["not_run"] = missing(name)
                elif name != OURS and n not in peers:
                    row["not_run"] = "only with --full"
                elif needed > HEADROOM * available():
                    row["not_run"] = f"would take about {needed / 2**30:.0f} GiB"
                elif n * seconds_a_token > PATIENCE:
                    row["not_run"] = f"would take about {n * seconds_a_token / 60:.0f} minutes"
                else:
                    say(f"memory of {name} {dtype}, {shape.name}, N = {n}")
                    start = time.monotonic()
                    row.update(measure(name, dtype, n, shape))
                    seconds_a_token = max(time.monotonic() - start - START_UP, 0) / n
                if "extra_bytes" in row:
                    seen.append((n, row["extra_bytes"]))
                rows.append(row)
                save(f"memory{shape.suffix}", result)
    return result


def available() -> int:
    if DEVICE == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def growing(seen: list[tuple[int, int]]) -> bool:
    return seen[-1][1] > 1.5 * seen[-2][1]


def table(result: dict) -> str:
    header = ["extra peak memory, MiB", *(f"N = {n:,}" for n in result["tokens"])]
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        for name in dict.fromkeys(row["entrant"] for row in result["rows"]):
            own = {r["tokens"]: r for r in result["rows"] if (r["entrant"], r["dtype"]) == (name, dtype)}
            if own:
                rows.append([f"{name} {dtype}", *(cell(own.get(n)) for n in result["tokens"])])
        itemsize = DTYPES[dtype].itemsize
        outputs = [f"{n * result['hidden'] * itemsize / MIB:,.0f}" for n in result["tokens"]]
        rows.append([f"(of which the gradient returned, in each, {dtype})", *outputs])
    return markdown(header, rows)


def cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    return f"{row['extra_bytes'] / MIB:,.0f}" if "extra_bytes" in row else f"not run: {row['not_run']}"


def plot(result: dict, path: Path, source: str) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if "extra_bytes" in row:
            points = lines.setdefault((row["entrant"], row["dtype"]), [])
            points.append((row["tokens"], row["extra_bytes"] / MIB))
    named = [Line(f"{name} {dtype}", name, points, dashed=dtype == "fp32") for (name, dtype), points in lines.items()]
    log_log([("", named)], "tokens", ["extra peak memory, MiB"], path, source)


def main(full: bool = False, dtypes: Iterable[str] = tuple(DTYPES)) -> list[dict]:
    """Whole: this library at every size, peers at two; `full`: peers at every size."""
    results = [run(TOKENS, TOKENS if full else TOKENS[:2], shape=shape, dtypes=dtypes) for shape in HERE]
    for result in results:
        print(table(result))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    arguments = parser.parse_args()
    if arguments.child:
        name, dtype, tokens, shape = arguments.child
        print(json.dumps(child(name, dtype, int(tokens), SHAPES[shape])))
    else:
        main(arguments.full, arguments.dtype)
