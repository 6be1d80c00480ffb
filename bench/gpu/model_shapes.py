"""Stage 5: every loss at the shapes of Qwen3 1.7B, 4B and 8B beside the peers: bf16, frozen head, forward and backward.

A part is one loss at one shape and one number of tokens. Parts run in order of worth, and each entrant's numbers are
kept as soon as they are there. Each is called once for its compilers, once for its time and its memory, and then in
interleaved rounds, unless that second call was slow: its time then stands alone. TFLOP/s count the products a loss
cannot do without: three for a divergence, two for log-probabilities. A difference of gradients is relative L2, from
ours; stage 3 has the errors against float64. Last comes the loss of a teacher that is known by its top K.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache, partial

import torch

from bench import entrants, machine, timing, topk_speed
from bench.entrants import DTYPES, OURS, Inputs
from bench.gpu.clock import extra_bytes, first_line
from bench.gpu.stage import Stage
from bench.shapes import QWEN3, Shape, synthetic

SHAPES = (QWEN3[2], QWEN3[0], QWEN3[1])  # in order of worth
TOYS, TOY_TOKENS = (Shape("toy", 64, 512),), (64, 16)
LOSSES = ("forward_kl", "entry_clip", "logprobs", "jsd")
TOKENS, FEWER_TOKENS = 8192, 2048
ROUNDS, BUDGET = 4, 2.5  # of a part; seconds after which no further round begins
SLOW = 0.25  # seconds of a call that is not made again
LEAST_LEFT = 6.0  # seconds without which no part begins
PRODUCTS = timing.OWN_GEMMS
K, TOY_K = 64, 8  # of a teacher that is known by its top K
UNITS = {"logprobs": 2}  # products of N H V; the divergences have 3


def run(stage: Stage) -> None:
    if stage.dry:
        torch.set_num_threads(1)  # toy products are faster so, beside other work
    shapes, counts = (TOYS, TOY_TOKENS) if stage.dry else (SHAPES, (TOKENS, FEWER_TOKENS))
    stage.keep(parts={}, rounds=ROUNDS)
    inputs = cache(lambda shape: synthetic(shape, counts[0]).to(DTYPES["bf16"]).on(stage.device))
    parts: dict[str, dict] = {}
    for loss in LOSSES:
        for shape in shapes:
            for tokens in counts:
                key = f"{loss}, {shape.name}, N {tokens:,}"
                if stage.left < LEAST_LEFT:
                    stage.leave_out(key, "no time was left")
                    continue
                part = parts[key] = {"loss": loss, "shape": shape._asdict(), "tokens": tokens, "rows": {}, "failed": {}}
                try:
                    measure(stage, part, inputs(shape).rows(slice(tokens)), lambda: stage.keep(parts=parts))
                except Exception as error:  # the other parts go on
                    stage.leave_out(key, first_line(error))
                stage.say(f"{key}: {summary(part)}")
    if stage.left < LEAST_LEFT:
        stage.leave_out("a teacher's top K", "no time was left")
        return
    try:
        found = topk_speed.run(counts[-1], TOY_K if stage.dry else K, ROUNDS, ("bf16",), shapes[0])
    except Exception as error:
        stage.leave_out("a teacher's top K", first_line(error))
        return
    stage.keep(top_k=found)
    stage.say(topk_speed.table(found))


def measure(stage: Stage, part: dict, x: Inputs, keep: Callable[[], None]) -> None:
    loss, rows, failed = part["loss"], part["rows"], part["failed"]
    own = partial(entrants.ours, loss, backend="torch" if stage.dry else "triton")
    functions = {OURS: own, **entrants.present(loss, compiled=False)}
    functions[OURS] = own
    jobs: dict[str, Callable[[], object]] = {}
    if loss != "logprobs":
        products = partial(timing.own_gemms, x, True)
        products()
        rows[PRODUCTS] = second_call(products)
        jobs[PRODUCTS] = products
    ours = None
    for name, function in functions.items():
        if stage.left < LEAST_LEFT - 2:
            failed[name] = "no time was left for its first call"
            continue
        job, failure = partial(entrants.value_and_grad, function, x), None
        try:
            (first, _), (value, gradient) = timing.timed_result(job)
            row = {"first_call": first, "value": value.item()}
            if name == OURS:
                ours = gradient
            elif ours is not None:
                row["gradient_difference"] = difference(gradient, ours)
            del value, gradient
            row |= second_call(job)
        except Exception as error:  # a peer that fails on this machine is named with its message
            failure = first_line(error)
        if failure:
            failed[name] = failure
            free()
            keep()
            continue
        rows[name] = row
        if row["median"] < SLOW:
            jobs[name] = job
        keep()
    del ours

    def after_round(seconds: dict[str, list[timing.Seconds]]) -> None:
        for name, times in seconds.items():
            rows[name].update(timing.summary(times))
        keep()

    slowest = max(row["median"] for row in rows.values())
    budget = min(0.1 if stage.dry else BUDGET, stage.left - LEAST_LEFT)
    if jobs and (stage.dry or budget > slowest):
        timing.interleave(jobs, ROUNDS, budget, after_round)
    count = flops(part)
    for row in rows.values():
        row["tflops"] = count / row["median"] / 1e12
    keep()


def second_call(job: Callable[[], object]) -> dict:
    """Time and extra memory of a call whose kernels are compiled."""
    seconds: list[timing.Seconds] = []
    extra = extra_bytes(lambda: seconds.append(timing.timed(job)))
    return {**timing.summary(seconds), "extra_bytes": extra}


def difference(gradient: torch.Tensor, ours: torch.Tensor) -> float:
    return ((gradient.float() - ours.float()).norm() / ours.float().norm()).item()


def free() -> None:
    """What a call that ran out of memory has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def flops(part: dict) -> int:
    shape = part["shape"]
    return 2 * UNITS.get(part["loss"], 3) * part["tokens"] * shape["hidden"] * shape["vocab"]


def summary(part: dict) -> str:
    times = ", ".join(f"{name} {1e3 * row['median']:.1f} ms" for name, row in part["rows"].items())
    return times + "".join(f"; {name} failed: {why}" for name, why in part["failed"].items())


def table(result: dict) -> str:
    """One table a loss; an entrant a row, a shape and number of tokens a column."""
    texts = ["bf16, frozen head, forward and backward: median, TFLOP/s of the products needed, extra GiB."]
    for loss in LOSSES:
        parts = [part for part in result["parts"].values() if part["loss"] == loss]
        if not parts:
            continue
        names = dict.fromkeys(name for part in parts for name in (*part["rows"], *part["failed"]))
        header = [loss, *(f"{part['shape']['name']}, N {part['tokens']:,}" for part in parts)]
        texts += ["", machine.markdown(header, [[name, *(cell(part, name) for part in parts)] for name in names])]
        reasons = {why: name for part in parts for name, why in part["failed"].items()}
        texts += ["", *(f"- {name}: {why}" for why, name in reasons.items())] if reasons else []
    if "top_k" in result:
        texts += ["", topk_speed.table(result["top_k"])]
    return "\n".join(texts)


def cell(part: dict, name: str) -> str:
    if name in part["failed"]:
        return "failed"
    row = part["rows"].get(name)
    if row is None:
        return ""
    once = " (once)" if len(row["rounds"]) == 1 else ""
    speed = f", {flops(part) / row['median'] / 1e12:.0f}"
    return f"{timing.duration(row['median'])}{once}{speed}, {row['extra_bytes'] / 2**30:.2f}"
