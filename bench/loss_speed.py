"""Time and error of one loss in one precision, all entrants in one process.

    python -m bench.loss_speed forward_kl bf16 [--tokens 2048] [--rounds 5] [--eager]

Inputs are SmolLM2-135M's hidden states over gsm_symbolic solutions (H = 576, V = 49,152), the teacher's at a mean KL of
0.1; on a GPU, states in the shape that `--shape` names. The head is frozen: gradients are for the hidden states. First
each entrant runs once (compilers compile) and its gradient's first rows are compared with float64, as is its loss over
these rows where that needs no second compilation; then the rounds, interleaved. `--eager` leaves out those that wait
for a compiler. The result is saved after every round.

A processor with AVX-512 is measured without it, as "AVX2 by limit", where the environment has ATEN_CPU_CAPABILITY=avx2,
ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2 and a new folder as TORCHINDUCTOR_CACHE_DIR: in its usual folder
Inductor finds the code it compiled for AVX-512, which then gives wrong numbers.

On a processor without bf16 instructions torch's bf16 products run at a hundredth of their fp32 speed where the sum is
over the vocabulary: there bf16 is measured at fewer tokens (`tokens_for`).
"""

from __future__ import annotations

import argparse

import torch

from bench import entrants, timing
from bench.entrants import DTYPES, LOSSES, OURS, Inputs, value_and_grad
from bench.machine import machine, markdown, native_precision, percent, processor_kind, save
from bench.progress import say
from bench.shapes import HERE, SHAPES, TOKENS, Shape, inputs

ORACLE_ROWS = 128  # rows compared with float64
PHASES = ("forward + backward", "forward only")


def tokens_for(dtype: str, whole: int = TOKENS) -> int:
    return whole // 8 if dtype == "bf16" and native_precision() == "fp32" else whole


def forward_only(function, x: Inputs) -> None:
    with torch.no_grad():
        function(x)


def measure(
    loss: str,
    dtype: str,
    tokens: int | None = None,
    rounds: int = 5,
    compiled: bool = True,
    shape: Shape = HERE[0],
    budget: float | None = None,
) -> dict:
    """`budget`: seconds after which a phase begins no further round."""
    tokens = tokens or tokens_for(dtype)
    say(f"{loss} {dtype}, {shape.name}, N = {tokens}: inputs and float64")
    x = inputs(shape, tokens).to(DTYPES[dtype])
    present = entrants.present(loss, compiled)
    checked = x.rows(slice(ORACLE_ROWS))
    exact_value, exact_grad = entrants.oracle(loss, checked)
    result: dict = {"loss": loss, "dtype": dtype, "tokens": tokens, "shape": shape._asdict(), "value": exact_value}
    result |= {"rows": [], "failed": {}}
    result["missing"] = {n: entrants.missing(n) for n in entrants.names(loss) if entrants.missing(n)}
    errors = {}
    for name, function in list(present.items()):
        say(f"  {name}: first call")
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
    if not compiled:
        waits = (n for n in entrants.names(loss) if n in entrants.COMPILED and n not in result["missing"])
        result["failed"].update(dict.fromkeys(waits, "left out of this run: it waits for a compiler"))
    for phase in PHASES:
        jobs = jobs_of(present, x, loss, backward=phase == PHASES[0])
        finished = list(result["rows"])

        def keep(seconds, phase=phase, finished=finished):
            say(f"  {phase}: round {len(seconds[OURS])} of {rounds}")
            new = [
                {"entrant": name, "phase": phase, **timing.summary(own), "error": errors.get(name)}
                for name, own in seconds.items()
            ]
            result["rows"] = finished + new
            save(result_name(loss, dtype, tokens, shape), result)

        timing.interleave(jobs, rounds, budget, keep)
    return result


def jobs_of(present: dict[str, entrants.Loss], x: Inputs, loss: str, backward: bool) -> dict:
    if backward:
        jobs = {name: (lambda f=f: value_and_grad(f, x)) for name, f in present.items()}
    else:
        jobs = {name: (lambda f=f: forward_only(f, x)) for name, f in present.items()}
        for name in present.keys() & entrants.COMPILED:
            jobs[name]()  # without a gradient is another graph for the compilers
    models = 1 if loss == "logprobs" else 2
    jobs[timing.OWN_GEMMS] = lambda: timing.own_gemms(x, backward, models)
    jobs[timing.MM_GEMMS] = lambda: timing.mm_gemms(x, backward, models)
    if x.student.is_cuda:  # kernels are compiled, and workspaces made, at the first call
        for job in jobs.values():
            job()
    return jobs


def result_name(loss: str, dtype: str, tokens: int, shape: Shape) -> str:
    """On a CPU one result for each kind of processor, so that all of them stay."""
    info = machine()
    kind = "" if "gpu" in info else "-" + processor_kind(info).lower().replace(" ", "-")
    return f"losses/{loss}-{dtype}-{tokens}{shape.suffix}{kind}"


def table(result: dict) -> str:
    """Times are medians with their range; ratios are of wall times, in brackets of CPU times."""
    header = ["entrant", *PHASES, "first call", f"against {OURS}", "gradient error", "loss error"]
    medians = {(row["entrant"], row["phase"]): row for row in result["rows"]}
    rows = []
    for name in dict.fromkeys(row["entrant"] for row in result["rows"]):
        both, forward = (medians.get((name, phase)) for phase in PHASES)
        own = medians[OURS, PHASES[0]]
        ratio = f"{both['median'] / own['median']:.2f}x ({both['cpu'] / own['cpu']:.2f}x)"
        error = both["error"] or {}
        times = [timing.with_spread(both), timing.with_spread(forward) if forward else ""]
        errors = [percent(error.get(kind)) for kind in ("gradient", "loss")]
        first = f"{error['first_call_seconds']:.0f} s" if "first_call_seconds" in error else ""
        rows.append([name, *times, first, ratio, *errors])
    for name, why in {**result["missing"], **result["failed"]}.items():
        rows.append([name, why, *[""] * 5])
    return markdown(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--tokens", type=int, help=f"default {TOKENS}; see above for bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", dest="compiled", action="store_false")
    parser.add_argument("--shape", choices=SHAPES, default=HERE[0].name)
    arguments = vars(parser.parse_args())
    print(table(measure(**{**arguments, "shape": SHAPES[arguments["shape"]]})))
