"""Interleaved timing: every round runs each entrant once, so that a noisy machine hurts all alike.

Wall time and the CPU time of the process: where others use the machine, the second is the one to read. On a GPU the
wall time is the device's own, between two CUDA events.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from atesd_kernels.backends import matmul
from atesd_kernels.backends.workspace import Workspace
from atesd_kernels.planning import CPP, ChunkPlan, choose_backend, gpu_chunk_bytes, gpu_memory
from bench.entrants import Inputs

T = TypeVar("T")
Seconds = tuple[float, float]  # wall, CPU


def timed_result(function: Callable[[], T]) -> tuple[Seconds, T]:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        result = function()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end) / 1000, time.process_time() - cpu), result
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def timed(function: Callable[[], object]) -> Seconds:
    return timed_result(function)[0]


def interleave(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    budget: float | None = None,
    after_round: Callable[[dict[str, list[Seconds]]], object] = lambda seconds: None,
) -> dict[str, list[Seconds]]:
    """Seconds of each function in each round. Call each once before, so that nothing compiles here.

    No round begins once `budget` seconds have passed; there is one in any case. `after_round` sees what there is.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in functions}
    order, start, mixing = list(functions), time.monotonic(), random.Random(0)
    for number in range(rounds):
        if number and budget is not None and time.monotonic() - start > budget:
            break
        for name in order:
            seconds[name].append(timed(functions[name]))
        # nobody always runs after the same neighbour: what a GPU did before decides at which clock it begins
        mixing.shuffle(order)
        after_round(seconds)
    return seconds


def summary(seconds: list[Seconds]) -> dict:
    wall, cpu = zip(*seconds, strict=True)
    spread = {"min": min(wall), "max": max(wall), "rounds": list(wall)}
    return {"median": statistics.median(wall), **spread, "cpu": statistics.median(cpu)}


def duration(seconds: float) -> str:
    """For a table: three significant digits, in milliseconds below a tenth of a second."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def with_spread(row: dict) -> str:
    """Median and range of a row of `summary`."""
    unit, factor = ("ms", 1000) if row["median"] < 0.1 else ("s", 1)
    low, median, high = (f"{factor * row[key]:.3g}" for key in ("min", "median", "max"))
    return f"{median} {unit} ({low} - {high})"


OWN_GEMMS = "its GEMMs alone"
MM_GEMMS = "the same GEMMs in torch.mm"


def gpu_plan(x: Inputs, trained: bool) -> ChunkPlan:
    """Backend "triton"'s chunks: whole rows of fp32 S and of D in the inputs' dtype."""
    tokens, vocab, device, width = len(x.student), len(x.weight), x.student.device, 4 + x.student.dtype.itemsize
    return ChunkPlan.make(
        tokens, vocab, width, device, gpu_chunk_bytes(tokens, vocab, width, trained, gpu_memory(device))
    )


def own_gemms(x: Inputs, backward: bool, models: int = 2) -> None:
    """The products of `linear_divergence` with a shared head, or with `models=1` those of `linear_logprobs`, in the
    shapes and on the road this library takes for them."""
    with torch.no_grad():
        device, vocab = x.student.device, len(x.weight)
        if device.type == "cpu":
            backend = choose_backend("auto", device, x.student.dtype, True, len(x.student) * vocab)
            return cpu_gemms(x, backward, models, in_cpp=backend == CPP)
        plan, dtype = gpu_plan(x, trained=False), x.student.dtype
        difference = (x.teacher.float() - x.student.float()).to(dtype)
        for rows in plan.row_chunks(len(x.student)):
            total = torch.zeros(x.student[rows].shape, device=device)
            for cols in plan.blocks(vocab):
                weight = x.weight[cols]
                g = matmul.logits(x.student[rows], weight, torch.float32)
                if models == 2:
                    g = matmul.logits(difference[rows], weight, dtype)
                if backward:
                    total += matmul.hidden_grad(g.to(dtype), weight)


def cpu_gemms(x: Inputs, backward: bool, models: int, in_cpp: bool) -> None:
    """Multiplies as the losses do, in memory that is new in each call, as theirs is.

    With `in_cpp` that is as in `backends/cpp_chunk.py`: fp32 results in whole rows, and one product for both models.
    The gradient is whatever bits then lie in the rows.
    """
    device, vocab = x.student.device, len(x.weight)
    dtype = matmul.product_dtype(x.student.dtype, device)
    plan = ChunkPlan.make(len(x.student), vocab, 4 * models, device, None, block_bytes=8 if in_cpp else 16)
    whole = in_cpp and matmul.writes_in_place(x.weight.dtype, x.student.shape[1])
    work, difference = Workspace(device, in_cpp), (x.teacher.float() - x.student.float()).to(dtype)
    buffer = torch.empty((models if in_cpp else 1) * plan.rows * vocab)
    if not in_cpp:
        buffer.fill_(1e-3)  # the blocks' products are written elsewhere
    for rows in plan.row_chunks(len(x.student)):
        total, h = torch.zeros(x.student[rows].shape), x.student[rows]
        both = buffer[: (models if in_cpp else 1) * len(h) * vocab].view(-1, vocab)
        places = {"both": both, "student": both[: len(h)], "difference": both[-len(h) :]}
        for cols in [slice(0, vocab)] if whole else plan.blocks(vocab):
            with work.lending(**{use: place[:, cols] for use, place in places.items()} if in_cpp else {}):
                products(x.weight[cols], h, difference[rows] if models == 2 else None, dtype, work)
        gradient = both[-len(h) :].view(dtype)[:, :vocab]
        for cols in plan.blocks(vocab) if backward else ():
            w = work.cast("head", x.weight[cols], dtype)
            matmul.add_hidden_grad(total, gradient[:, cols], w, work)


def products(weight: Tensor, h: Tensor, difference: Tensor | None, dtype: torch.dtype, work: Workspace) -> None:
    """Multiplies the head by `h`, and by the teacher's `difference` from it if there is one."""
    if difference is not None and work.in_cpp and h.dtype == dtype:
        matmul.logits(torch.cat([h, difference]), weight, torch.float32, work=work, use="both")
        return
    matmul.logits(h, weight, torch.float32, work=work, use="student")
    if difference is not None:
        out = torch.float32 if work.in_cpp else dtype
        matmul.logits(difference, work.cast("head", weight, dtype), out, work=work, use="difference")


def mm_gemms(x: Inputs, backward: bool, models: int = 2, rows: int = 512) -> None:
    """Two products `[N, H] x [H, V]` (one with `models=1`) and, for the gradient, one `[N, V] x [V, H]`.

    In the inputs' dtype.
    """
    with torch.no_grad():
        rows = rows if x.student.device.type == "cpu" else len(x.student)
        out = torch.empty(rows, len(x.weight), dtype=x.student.dtype, device=x.student.device)
        for s, t in zip(x.student.split(rows), x.teacher.split(rows), strict=True):
            torch.mm(s, x.weight.T, out=out[: len(s)])
            if models == 2:
                torch.mm(t, x.weight.T, out=out[: len(s)])
            if backward:
                torch.mm(out[: len(s)], x.weight)
