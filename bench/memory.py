"""Extra peak memory of forward + backward to the hidden states, over the number of tokens.

    python -m bench.memory [--full]

Without `--full` the peers are measured at the two smaller sizes only: at the largest they take minutes each. Each
figure comes from a process of its own: inputs made, one warm-up call at 1,024 tokens (libraries load, compilers
compile), freed memory handed back to the system, then the peak resident set of one call less the resident set before
it. The gradient that the call returns, N x H, is included. H = 576 and V = 49,152 are SmolLM2-135M's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

from bench.entrants import DTYPES, OURS, missing
from bench.machine import ROOT, markdown, save

HIDDEN, VOCAB, WARM_UP = 576, 49_152, 1024
TOKENS = (1024, 4096, 16_384)
ENTRANTS = (OURS, "dense torch (TRL)", "Liger chunked JSD")
MIB = 2**20
HEADROOM = 0.7  # of the free memory: what a run may be expected to take


def child(name: str, dtype: str, tokens: int) -> float:
    """Extra peak bytes in this process."""
    import torch

    from bench.entrants import Inputs, entrant, value_and_grad

    torch.manual_seed(0)
    student = torch.randn(tokens, HIDDEN)
    teacher = student + 0.1 * torch.randn(tokens, HIDDEN)
    head = torch.randn(VOCAB, HIDDEN) * 0.1
    x = Inputs(student, head, teacher, torch.randint(VOCAB, (tokens,))).to(DTYPES[dtype])
    del student, teacher, head
    function = entrant(name, "forward_kl")
    value_and_grad(function, x.rows(slice(WARM_UP)))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    result = value_and_grad(function, x)
    peak = status("VmHWM")
    assert torch.isfinite(result[1]).all()
    return peak - before


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, dtype: str, tokens: int) -> dict:
    command = [sys.executable, "-m", "bench.memory", "--child", name, dtype, str(tokens)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        tail = run.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"not_run": f"ended with status {run.returncode}: {tail[0][:200]}"}
    return {"extra_bytes": json.loads(run.stdout.splitlines()[-1])}


def run(tokens: tuple[int, ...] = TOKENS, peers: tuple[int, ...] = TOKENS) -> dict:
    """This library at all `tokens`, peers at those that are among `peers`."""
    import psutil

    rows = []
    for dtype in DTYPES:
        for name in ENTRANTS:
            seen = []
            for n in tokens:
                row = {"entrant": name, "dtype": dtype, "tokens": n}
                available = psutil.virtual_memory().available
                needed = seen[-1][1] * n / seen[-1][0] if len(seen) > 1 and growing(seen) else 0
                if missing(name):
                    row["not_run"] = missing(name)
                elif name != OURS and n not in peers:
                    row["not_run"] = "only with --full"
                elif needed > HEADROOM * available:
                    row["not_run"] = f"would take about {needed / 2**30:.0f} GiB"
                else:
                    row.update(measure(name, dtype, n))
                if "extra_bytes" in row:
                    seen.append((n, row["extra_bytes"]))
                rows.append(row)
                print(row, flush=True)
    return {"hidden": HIDDEN, "vocab": VOCAB, "tokens": list(tokens), "rows": rows}


def growing(seen: list[tuple[int, int]]) -> bool:
    return seen[-1][1] > 1.5 * seen[-2][1]


def table(result: dict) -> str:
    header = ["extra peak memory, MiB", *(f"N = {n:,}" for n in result["tokens"])]
    rows = []
    for dtype in DTYPES:
        for name in ENTRANTS:
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


def main(full: bool = False) -> dict:
    result = run(TOKENS, TOKENS if full else TOKENS[:2])
    print(table(result))
    save("memory", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child[0], arguments.child[1], int(arguments.child[2]))))
    else:
        main(arguments.full)
