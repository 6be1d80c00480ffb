"""Stage 3: forward KL at the shape of the published H100 figures, N 8,192, H 4,096, V 128,256, bf16, beside every peer.

Each call gives the loss and the gradient of the hidden states; with a trained head, the head's too. Rounds are
interleaved, figures are medians. The gradient's error is relative L2 against float64, over the first 128 rows. Then
every divergence of this library at the same shape, beside the time its products and its bytes allow.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import atesd_kernels
from bench import entrants, machine, timing
from bench.entrants import DENSE, DTYPES, OURS, TRL_CHUNKED, Inputs
from bench.gpu.clock import extra_bytes, first_line
from bench.gpu.products import trained_products
from bench.gpu.stage import Stage
from bench.shapes import Shape, synthetic

SHAPE, TOKENS = Shape("published", 4096, 128_256), 8192
TOY, TOY_TOKENS = Shape("toy", 64, 1003), 160
ORACLE_ROWS = 128
OF_COPY = 0.85  # of the copy's bytes a second: what the row kernels aim at
SLACK = 1.03
# Bytes a logit pair that the row kernels read and write: fp32 S, bf16 D, the gradient over D. Total variation keeps D
# in fp32 and the gradient beside it, and forms D from two products.
BYTES = {"forward_kl": 14, "reverse_kl": 14, "jeffreys": 14, "total_variation": 26}
OTHER_BYTES = 20
DIVERGENCES = (
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {}),
    ("jeffreys", {}),
    ("skew_kl", {}),
    ("skew_reverse_kl", {}),
    ("total_variation", {}),
    ("alpha", {}),
    ("forward_kl", {"entry_clip": entrants.ENTRY_CLIP}),
)
PRODUCTS = timing.OWN_GEMMS
RETIRED = f"{OURS}, triton_tiled"  # a backend that results of before its retirement still hold
BF16_LOGITS = f"{OURS}, logits_dtype=bf16"
# in order of worth: what comes late is what the time limit costs first
PEERS = (
    "Liger fused JSD", DENSE, entrants.LIGER_EAGER, "flash-linear-attention", "ORDA", TRL_CHUNKED,
    "dense torch, compiled", "Liger chunked JSD",
)  # fmt: skip


def sizes(stage: Stage) -> tuple[Shape, int]:
    return (TOY, TOY_TOKENS) if stage.dry else (SHAPE, TOKENS)


def backends(stage: Stage) -> dict[str, str]:
    """Names in tables, and what `backend=` is given."""
    return {OURS: "torch" if stage.dry else "triton"}


def measured(rows: dict[str, dict]) -> list[tuple[str, dict]]:
    """The entrants that have a time, fastest first, without the retired backend."""
    timed = [(name, row) for name, row in rows.items() if "median" in row and name != RETIRED]
    return sorted(timed, key=lambda item: item[1]["median"])


def with_bf16_logits(x: Inputs, backend: str) -> Tensor:
    """The student's logits rounded to bf16, as most peers round both models': fewer bytes, more error."""
    return atesd_kernels.linear_divergence(x.student, x.weight, x.teacher, logits_dtype=torch.bfloat16, backend=backend)


def gradients(function: Callable[[Inputs], Tensor], x: Inputs, trained: bool) -> list[Tensor]:
    """Of the hidden states, and of a trained head."""
    x = x._replace(student=x.student.detach().requires_grad_(), weight=x.weight.detach().requires_grad_(trained))
    function(x).backward()
    return [x.student.grad] + ([x.weight.grad] if trained else [])


def run(stage: Stage) -> None:
    shape, tokens = sizes(stage)
    x = synthetic(shape, tokens).to(DTYPES["bf16"])
    stage.keep(tokens=tokens, shape=shape._asdict(), machine=machine.machine())
    checked = x.rows(slice(ORACLE_ROWS))
    truth = entrants.oracle("forward_kl", checked)[1]
    stage.say("inputs and float64 are there")
    ours = {name: partial(entrants.ours, "forward_kl", backend=backend) for name, backend in backends(stage).items()}
    ours[BF16_LOGITS] = partial(with_bf16_logits, backend=backends(stage)[OURS])
    for trained in (False, True):
        measure(stage, head_name(trained), ours, x, trained, truth)
    every_divergence(stage, x)
    peers = {name: entrants.entrant(name, "forward_kl") for name in PEERS if name in entrants.present("forward_kl")}
    for name in [name for name in PEERS if name not in peers and not stage.dry]:
        stage.leave_out(name, entrants.missing(name) or "not there")
    for trained in (False, True):
        measure(stage, f"{head_name(trained)}, with peers", {**ours, **peers}, x, trained, truth)


def head_name(trained: bool) -> str:
    return "trained" if trained else "frozen"


def products_of(x: Inputs, trained: bool) -> Callable[[], object]:
    return partial(trained_products, x) if trained else partial(timing.own_gemms, x, True)


def measure(stage: Stage, key: str, functions: dict, x: Inputs, trained: bool, truth: Tensor) -> None:
    """Time, memory and error of each; saved after every round."""
    tokens, rows, failed, jobs = len(x.student), {}, {}, {}
    for name, function in functions.items():
        if stage.left < 8:
            failed[name] = "no time was left for its first call"
            continue
        try:
            gradient = gradients(function, x, trained)[0]
            error = entrants.relative_error(gradient[:ORACLE_ROWS].double() * (tokens / len(truth)), truth)
            del gradient
            gc.collect()  # what lies in cycles would leave during the call
            extra = extra_bytes(partial(gradients, function, x, trained))
        except Exception as problem:  # a peer that fails here is named, and the others are measured
            failed[name] = first_line(problem)
            stage.say(f"{key}: {name} failed: {failed[name]}")
            continue
        rows[name] = {"gradient_error": error, "extra_bytes": extra}
        jobs[name] = partial(gradients, function, x, trained)
        stage.say(f"{key}: {name}, first call, error {100 * error:.3g} %, extra {extra / 2**30:.2f} GiB")
    jobs[PRODUCTS] = products_of(x, trained)
    jobs[PRODUCTS]()

    def keep(seconds: dict) -> None:
        for name, own in seconds.items():
            rows.setdefault(name, {}).update(timing.summary(own))
        stage.keep(**{key: {"rows": rows, "failed": failed}})

    timing.interleave(jobs, 11, budget=max(2.0, min(14.0, stage.left - 10)), after_round=keep)
    for name in (*functions, PRODUCTS):
        if "median" in rows.get(name, {}):
            stage.say(f"{key}: {name}: {1e3 * rows[name]['median']:.2f} ms")


def every_divergence(stage: Stage, x: Inputs) -> None:
    """Ours alone, frozen and trained head, and the products in the same rounds."""
    backend = backends(stage)[OURS]
    for trained in (False, True):
        jobs: dict = {PRODUCTS: products_of(x, trained)}
        for name, options in DIVERGENCES:

            def call(x, name=name, options=options):
                return atesd_kernels.linear_divergence(
                    x.student, x.weight, x.teacher, divergence=name, backend=backend, **options
                )

            jobs[name + ("+entry_clip" if options else "")] = partial(gradients, call, x, trained)
        for job in jobs.values():
            job()
        seconds = timing.interleave(jobs, 5, budget=max(1.0, min(8.0, stage.left - 20)))
        medians = {name: statistics.median(wall for wall, _ in own) for name, own in seconds.items()}
        rows = {name: {"seconds": seconds} for name, seconds in medians.items()}
        for name in jobs:
            stage.say(f"{head_name(trained)} {name}: {1e3 * medians[name]:.2f} ms")
        stage.keep(**{f"divergences, {head_name(trained)}": rows})


def allowed_seconds(result: dict, head: str, name: str, copy: float) -> float:
    """What a divergence may take: its products, measured beside it, and its row kernels' bytes at 85 % of the copy's
    rate, with 3 % on top."""
    units = 3 if head == "frozen" else 4
    products = result[f"divergences, {head}"][PRODUCTS]["seconds"]
    products *= (units + (name == "total_variation")) / units
    moved = BYTES.get(name, OTHER_BYTES) * result["tokens"] * result["shape"]["vocab"]
    return SLACK * (products + moved / (OF_COPY * copy))


ONE_PROGRAM_A_ROW = 1024  # rows of a chunk that fill a GPU: more are the same to Triton


def warm(shape: Shape = SHAPE, tokens: int = TOKENS) -> list[Callable[[], object]]:
    """Calls that compile what `run` launches. Kernels do not depend on the hidden size, row kernels not on the rows."""
    device, vocab = entrants.DEVICE, shape.vocab

    def call(name: str, options: dict, backend: str, rows: int) -> None:
        h, t = (torch.zeros(rows, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
        w = torch.zeros(vocab, 16, dtype=torch.bfloat16, device=device)
        h.requires_grad_()
        loss = atesd_kernels.linear_divergence(h, w, t, divergence=name, backend=backend, **options)
        loss.backward()

    found = [partial(call, name, options, "triton", ONE_PROGRAM_A_ROW) for name, options in DIVERGENCES]
    low = dict(logits_dtype=torch.bfloat16)
    return [
        *found,
        partial(call, "forward_kl", low, "triton", ONE_PROGRAM_A_ROW),
    ]


def table(result: dict) -> str:
    """Frozen and trained heads side by side."""
    shape = result["shape"]
    flops = 2 * result["tokens"] * shape["hidden"] * shape["vocab"]
    lines = [
        f"Forward KL, N {result['tokens']:,}, H {shape['hidden']:,}, V {shape['vocab']:,}, bf16: "
        "loss and gradients, median of interleaved rounds."
    ]
    for head, units in (("frozen", 3), ("trained", 4)):
        found = result.get(f"{head}, with peers") or result.get(head)
        if not found:
            continue
        rows = found["rows"]
        products = rows.get(PRODUCTS, {}).get("median")
        own = rows.get(OURS, {}).get("median")
        cells = []
        for name, row in measured(rows):
            cells.append([
                name,
                timing.with_spread(row),
                f"{units * flops / row['median'] / 1e12:.0f}",
                f"{100 * products / row['median']:.0f} %" if products else "",
                f"{row['median'] / own:.2f}x" if own else "",
                f"{row['extra_bytes'] / 2**30:.2f}" if "extra_bytes" in row else "",
                machine.percent(row.get("gradient_error")),
            ])  # fmt: skip
        cells += [[name, why, *[""] * 5] for name, why in found["failed"].items()]
        header = [f"{head} head", "time", "TFLOP/s", "products' share", "of ours", "extra GiB", "gradient error"]
        lines += ["", machine.markdown(header, cells)]
        every = result.get(f"divergences, {head}")
        if every:
            cells = [[name, f"{1e3 * row['seconds']:.2f} ms"] for name, row in every.items()]
            lines += ["", machine.markdown([f"{head} head", "time"], cells)]
    return "\n".join(lines)
