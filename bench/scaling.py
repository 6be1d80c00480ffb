"""Time and memory against tokens, vocabulary, response length and batch, with the exponents fitted to them.

    python -m bench.scaling [--dtype fp32] [--rounds 3] [--quick]

Two of the axes are the loss alone (forward KL, forward + backward to the hidden states): its tokens N, and its
vocabulary V. The other two are what a trainer does with a micro-batch: SmolLM2-135M as the student and, frozen, as the
teacher behind a longer prompt, hidden states of the response, loss, and backward through the student. This library
(`pair_divergence`) stands beside dense logits with TRL's loss. Times are medians of rounds interleaved between the two;
memory is the peak, beyond what was there, of one more call. An exponent k is the slope of a straight line through the
logarithms, y ~ x^k: 1 is proportional, 0 is flat. The result is saved after every point.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from bench import entrants, timing
from bench.entrants import DENSE, DEVICE, DTYPES, OURS, value_and_grad
from bench.machine import markdown, native_precision, save
from bench.memory import MIB, extra_peak
from bench.plots import Line, log_log
from bench.progress import say
from bench.shapes import HERE, Shape, synthetic

COMPARED = (OURS, DENSE)
PROMPT, TEACHER_PROMPT = 96, 160  # tokens before the response
NAMES = {"tokens": "N, tokens", "vocab": "V, vocabulary", "length": "response length", "batch": "batch"}
# axis -> its points, and what is held fixed
Axes = dict[str, tuple[tuple[int, ...], dict[str, int]]]
FULL: Axes = {
    "tokens": ((256, 512, 1024, 2048, 4096), {"vocab": HERE[0].vocab}),
    "vocab": ((8192, 16_384, 32_768, 65_536), {"tokens": 512}),
    "length": ((32, 64, 128, 256), {"batch": 2}),
    "batch": ((1, 2, 4, 8), {"length": 64}),
}
QUICK: Axes = {
    "tokens": ((128, 256, 512), {"vocab": HERE[0].vocab}),
    "vocab": ((6144, 12_288, 24_576), {"tokens": 128}),
    "length": ((16, 32, 64), {"batch": 1}),
    "batch": ((1, 2, 4), {"length": 16}),
}


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def losses(dtype: torch.dtype, tokens: int, vocab: int) -> dict[str, Callable]:
    x = synthetic(Shape("", HERE[0].hidden, vocab), tokens).to(dtype)
    return {name: partial(value_and_grad, entrants.entrant(name, "forward_kl"), x) for name in COMPARED}


@cache
def models(dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    from atesd.models.smollm import smollm2_path

    student = AutoModelForCausalLM.from_pretrained(str(smollm2_path()), dtype=dtype).to(DEVICE)
    return student, copy.deepcopy(student).eval().requires_grad_(False)


def updates(dtype: torch.dtype, length: int, batch: int) -> dict[str, Callable]:
    """Random tokens: what they say changes no time."""
    from atesd_kernels.integrations.pairs import collate, pair_divergence

    student, teacher = models(dtype)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(student.config.vocab_size, (count,), generator=generator).tolist()

    keys = {"prompt_ids": PROMPT, "teacher_prompt_ids": TEACHER_PROMPT, "response_ids": length}
    pairs = [{key: tokens(count) for key, count in keys.items()} for _ in range(batch)]
    inputs = {name: tensor.to(DEVICE) for name, tensor in collate(pairs).items()}

    def ours() -> None:
        student.zero_grad()
        pair_divergence(student, inputs, teacher).backward()

    def dense() -> None:
        student.zero_grad()
        kept = {"logits_to_keep": length + 1, "use_cache": False}
        logits = student(input_ids=inputs["input_ids"], **kept).logits[:, :-1]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=inputs["teacher_input_ids"], **kept).logits[:, :-1]
        entrants.trl_function("jsd")(logits.flatten(0, 1), teacher_logits.flatten(0, 1), beta=0.0).backward()

    return {OURS: ours, DENSE: dense}


def point(dtype: str, sizes: dict[str, int], rounds: int) -> dict[str, dict]:
    """`{entrant: {"median", ..., "extra_bytes"}}` at one point of an axis."""
    make = losses if "vocab" in sizes else updates
    jobs = make(DTYPES[dtype], **sizes)
    for job in jobs.values():
        job()
    rows = {name: timing.summary(seconds) for name, seconds in timing.interleave(jobs, rounds).items()}
    for name, job in jobs.items():
        rows[name]["extra_bytes"] = extra_peak(job)[0]
    return rows


def run(axes: Axes = FULL, dtype: str | None = None, rounds: int = 3) -> dict:
    dtype = dtype or native_precision()
    rows: list[dict] = []
    fixed = {axis: held for axis, (_, held) in axes.items()}
    result = {"dtype": dtype, "hidden": HERE[0].hidden, "fixed": fixed, "rows": rows}
    for axis, (points, held) in axes.items():
        for value in points:
            say(f"scaling, {dtype}: {NAMES[axis]} = {value}")
            for name, row in point(dtype, {axis: value, **held}, rounds).items():
                rows.append({"axis": axis, "value": value, "entrant": name, **row})
            save(f"scaling{HERE[0].suffix}", result)
    models.cache_clear()
    return result


def lines(result: dict, quantity: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """`{(axis, entrant): [(value, quantity)]}`; memory below a MiB counts as one: it is noise."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in result["rows"]:
        y = row["median"] if quantity == "seconds" else max(row["extra_bytes"] / MIB, 1.0)
        found.setdefault((row["axis"], row["entrant"]), []).append((row["value"], y))
    return found


def table(result: dict) -> str:
    """Exponents, and the two ends of each line they were fitted to."""
    seconds, memory = lines(result, "seconds"), lines(result, "memory")
    rows = []
    for axis, name in seconds:
        times, peaks = seconds[axis, name], memory[axis, name]
        held = ", ".join(f"{key} {value:,}" for key, value in result["fixed"][axis].items())
        first, last = times[0], times[-1]
        cells = [f"{NAMES[axis]} ({held})", name, f"{first[0]:,} - {last[0]:,}"]
        cells += [fitted(times), f"{timing.duration(first[1])} - {timing.duration(last[1])}"]
        cells += [fitted(peaks), f"{peaks[0][1]:,.0f} - {peaks[-1][1]:,.0f} MiB"]
        rows.append(cells)
    header = ["against (fixed)", "", "from - to", "exponent of time", "time", "exponent of memory", "extra peak memory"]
    return f"{result['dtype']}, H = {result['hidden']}.\n\n{markdown(header, rows)}"


def fitted(points: list[tuple[float, float]]) -> str:
    return f"{exponent(*map(list, zip(*points, strict=True))):.2f}" if len(points) > 1 else ""


def plot(result: dict, path: Path, source: str) -> None:
    axes = list(result["fixed"])
    panels = []
    for quantity in ("seconds", "memory"):
        found = lines(result, quantity)
        panels += [("", [Line(n, n, found[axis, n]) for n in COMPARED if (axis, n) in found]) for axis in axes]
    log_log(panels, [NAMES[axis] for axis in axes], ["seconds", "extra peak memory, MiB"], path, source)


def main(axes: Axes = FULL, dtype: str | None = None, rounds: int = 3) -> dict:
    result = run(axes, dtype, rounds)
    print(table(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 where the machine has instructions for it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the smaller points of `pytest bench`")
    arguments = parser.parse_args()
    main(QUICK if arguments.quick else FULL, arguments.dtype, arguments.rounds)
