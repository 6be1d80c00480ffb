"""Where the time goes: the op of each backend beside its matrix products alone, in one process, round by round.

    python -m bench.gemm_share [--tokens 1024] [--rounds 5] [--dtype fp32]

The share is the time of the products (in the shapes, and on the road, this library takes for them) over the time of the
op: what is missing to 100 % is elementwise work. `torch.mm` over the same products stands beside it. A backend that
cannot run on this machine is named.
"""

from __future__ import annotations

import argparse
from functools import partial

from atesd_kernels.planning import BACKENDS, TORCH, unavailable
from bench import entrants, timing
from bench.entrants import DTYPES, NEEDS_GPU, value_and_grad
from bench.loss_speed import PHASES, forward_only
from bench.machine import markdown, save
from bench.progress import say
from bench.shapes import HERE, TOKENS, Shape, inputs
from bench.timing import MM_GEMMS, OWN_GEMMS

LOSSES = ("forward_kl", "jsd")


def reasons(device) -> dict[str, str]:
    """Why backends do not take part here. Interpreted Triton is for tests: it counts as none."""
    found = {}
    for backend in BACKENDS:
        why = unavailable(backend, device)
        if device.type == "cpu" and backend not in TORCH:
            why = NEEDS_GPU
        if why:
            found[backend] = why
    return found


def run(
    tokens: int = TOKENS // 2,
    rounds: int = 5,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    losses: tuple[str, ...] = LOSSES,
    phases: tuple[str, ...] = PHASES,
    shape: Shape = HERE[0],
    budget: float | None = None,
) -> dict:
    rows: list[dict] = []
    result = {"tokens": tokens, "shape": shape._asdict(), "rows": rows}
    for dtype in dtypes:
        x = inputs(shape, tokens).to(DTYPES[dtype])
        result["not_run"] = reasons(x.student.device)
        for phase in phases:
            backward = phase == PHASES[0]
            call = value_and_grad if backward else forward_only
            jobs = {
                (loss, backend): partial(call, partial(entrants.ours, loss, backend=backend), x)
                for loss in losses
                for backend in BACKENDS
                if backend not in result["not_run"]
            }
            jobs |= {
                ("", OWN_GEMMS): partial(timing.own_gemms, x, backward),
                ("", MM_GEMMS): partial(timing.mm_gemms, x, backward),
            }
            first = {}
            for name, job in jobs.items():
                say(f"GEMM share, {dtype}, {phase}: {' '.join(name).strip()}, first call")
                first[name] = timing.timed(job)[0]
            for (loss, backend), seconds in timing.interleave(jobs, rounds, budget).items():
                row = {"loss": loss, "backend": backend, "dtype": dtype, "phase": phase}
                rows.append({**row, "first_call_seconds": first[loss, backend], **timing.summary(seconds)})
            save(f"gemm_share{shape.suffix}", result)
    return result


def table(result: dict) -> str:
    floors = {(r["dtype"], r["phase"], r["backend"]): r for r in result["rows"] if not r["loss"]}
    rows = []
    for row in (r for r in result["rows"] if r["loss"]):
        own, mm = (floors[row["dtype"], row["phase"], name] for name in (OWN_GEMMS, MM_GEMMS))
        times = [timing.with_spread(r) for r in (row, own, mm)]
        label = f"{row['backend']}, {row['loss']} {row['dtype']}, {row['phase']}"
        share = f"{100 * own['median'] / row['median']:.0f} %"
        rows.append([label, *times, share, timing.duration(row["first_call_seconds"])])
    rows += [[f"{backend}: {why}", *[""] * 5] for backend, why in result["not_run"].items()]
    shape = result["shape"]
    header = ["backend", "op", OWN_GEMMS, MM_GEMMS, "share", "first call"]
    note = f"N = {result['tokens']:,}, H = {shape['hidden']:,}, V = {shape['vocab']:,}; median (range)."
    return f"{note}\n\n{markdown(header, rows)}"


def main(**options) -> list[dict]:
    results = [run(shape=shape, **options) for shape in HERE]
    for result in results:
        print(table(result))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=TOKENS // 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    arguments = parser.parse_args()
    main(
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        dtypes=(arguments.dtype,) if arguments.dtype else tuple(DTYPES),
    )
