"""Time and error of one loss in one precision, all entrants in one process.

    python -m bench.loss_speed forward_kl bf16 [--tokens 2048] [--rounds 5] [--eager]

Inputs are SmolLM2-135M's hidden states over gsm_symbolic solutions (H = 576, V = 49,152), the teacher's at a mean KL of
0.1. The head is frozen: gradients are for the hidden states. First each entrant runs once (compilers compile) and its
gradient's first rows are compared with float64, as is its loss over these rows where that needs no second compilation;
then the rounds, interleaved. `--eager` leaves out those that wait for a compiler.
"""

from __future__ import annotations

import argparse
from functools import cache

import torch

from bench import entrants, smollm_states, timing
from bench.entrants import DTYPES, LOSSES, OURS, Inputs, value_and_grad
from bench.machine import RESULTS, markdown, percent, save

TOKENS = 2048
ORACLE_ROWS = 128  # rows compared with float64
PHASES = ("forward + backward", "forward only")


@cache
def inputs(tokens: int) -> Inputs:
    return smollm_states.solution_inputs(tokens)


def forward_only(function, x: Inputs) -> None:
    with torch.no_grad():
        function(x)


def measure(
    loss: str,
    dtype: str,
    tokens: int = TOKENS,
    rounds: int = 5,
    phases: tuple[str, ...] = PHASES,
    compiled: bool = True,
) -> dict:
    x = inputs(tokens).to(DTYPES[dtype])
    present = entrants.present(loss, compiled)
    checked = x.rows(slice(ORACLE_ROWS))
    exact_value, exact_grad = entrants.oracle(loss, checked)
    result: dict = {"loss": loss, "dtype": dtype, "tokens": tokens, "value": exact_value, "rows": [], "failed": {}}
    errors = {}
    for name, function in list(present.items()):
        try:
            (first, _), (_, grad) = timing.timed_result(lambda f=function: value_and_grad(f, x))
            if name in entrants.COMPILED:
                errors[name] = {"first_call_seconds": first}
            else:
                with torch.no_grad():
                    value = function(checked).double().item()
                errors[name] = {"loss": abs(value - exact_value) / abs(exact_value)}
        except Exception as error:  # a peer that fails on this machine is named with its message, not dropped
            result["failed"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            del present[name]
            continue
        share = grad[:ORACLE_ROWS].double() * (tokens / len(checked.student))
        errors[name]["gradient"] = entrants.relative_error(share, exact_grad)
    for phase in phases:
        backward = phase == PHASES[0]
        if backward:
            jobs = {name: (lambda f=f: value_and_grad(f, x)) for name, f in present.items()}
        else:
            jobs = {name: (lambda f=f: forward_only(f, x)) for name, f in present.items()}
            for job in jobs.values():
                job()  # without a gradient is another graph for the compilers
        if loss != "logprobs":
            jobs[timing.OWN_GEMMS] = lambda backward=backward: timing.own_gemms(x, backward)
            jobs[timing.MM_GEMMS] = lambda backward=backward: timing.mm_gemms(x, backward)
        for name, seconds in timing.interleave(jobs, rounds).items():
            row = {"entrant": name, "phase": phase, **timing.summary(seconds), "error": errors.get(name)}
            result["rows"].append(row)
    left_out = [] if compiled else [n for n in entrants.names(loss) if n in entrants.COMPILED]
    result["failed"].update(dict.fromkeys(left_out, "left out of this run: it waits for a compiler"))
    result["missing"] = {n: entrants.missing(n) for n in entrants.names(loss) if entrants.missing(n)}
    result["gpu_only"] = [name for name, losses in entrants.GPU_ONLY.items() if loss in losses]
    (RESULTS / "losses").mkdir(parents=True, exist_ok=True)
    save(f"losses/{loss}-{dtype}-{tokens}", result)
    return result


def table(result: dict) -> str:
    """Ratios are of wall times, in brackets of CPU times."""
    header = ["entrant", *PHASES, "range", "first call", f"against {OURS}", "gradient error", "loss error"]
    medians = {(row["entrant"], row["phase"]): row for row in result["rows"]}
    rows = []
    for name in dict.fromkeys(row["entrant"] for row in result["rows"]):
        both, forward = (medians.get((name, phase)) for phase in PHASES)
        own = medians[OURS, PHASES[0]]
        ratio = f"{both['median'] / own['median']:.2f}x ({both['cpu'] / own['cpu']:.2f}x)"
        error = both["error"] or {}
        spread = f"{both['min']:.2f} - {both['max']:.2f}"
        times = [f"{both['median']:.2f} s", f"{forward['median']:.2f} s" if forward else "", spread]
        errors = [percent(error.get(kind)) for kind in ("gradient", "loss")]
        first = f"{error['first_call_seconds']:.0f} s" if "first_call_seconds" in error else ""
        rows.append([name, *times, first, ratio, *errors])
    for name, why in {**result["missing"], **result["failed"]}.items():
        rows.append([name, why, *[""] * 6])
    for name in result["gpu_only"]:
        rows.append([name, "has no CPU path", *[""] * 6])
    return markdown(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", dest="compiled", action="store_false")
    print(table(measure(**vars(parser.parse_args()))))
