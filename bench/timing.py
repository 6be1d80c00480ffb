"""Interleaved timing: every round runs each entrant once, so that a noisy machine hurts all alike.

Wall time and the CPU time of the process: where others use the machine, the second is the one to read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from atesd_kernels import matmul
from atesd_kernels.planning import ChunkPlan
from bench.entrants import Inputs

T = TypeVar("T")
Seconds = tuple[float, float]  # wall, CPU


def timed_result(function: Callable[[], T]) -> tuple[Seconds, T]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def timed(function: Callable[[], object]) -> Seconds:
    return timed_result(function)[0]


def interleave(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each function in each round. Call each once before, so that nothing compiles here."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(timed(functions[name]))
        order = order[1:] + order[:1]  # nobody always runs after the same neighbour
    return seconds


def summary(seconds: list[Seconds]) -> dict:
    wall, cpu = zip(*seconds, strict=True)
    spread = {"min": min(wall), "max": max(wall), "rounds": list(wall)}
    return {"median": statistics.median(wall), **spread, "cpu": statistics.median(cpu)}


OWN_GEMMS = "its GEMMs alone"
MM_GEMMS = "the same GEMMs in torch.mm"


def own_gemms(x: Inputs, backward: bool) -> None:
    """The products of `linear_divergence` with a shared head, in the shapes and on the road it takes for them."""
    with torch.no_grad():
        plan = ChunkPlan.make(len(x.student), len(x.weight), 8, x.student.device, None, block_bytes=16)
        difference = (x.teacher.float() - x.student.float()).to(x.student.dtype)
        for rows in plan.row_chunks(len(x.student)):
            total = torch.zeros(x.student[rows].shape)
            for cols in plan.blocks(len(x.weight)):
                weight = x.weight[cols]
                matmul.logits(x.student[rows], weight, torch.float32)
                g = matmul.logits(difference[rows], weight, x.student.dtype)
                if backward:
                    total += matmul.hidden_grad(g, weight)


def mm_gemms(x: Inputs, backward: bool, rows: int = 512) -> None:
    """Two products `[N, H] x [H, V]` and, for the gradient, one `[N, V] x [V, H]`, in the inputs' dtype."""
    with torch.no_grad():
        out = torch.empty(rows, len(x.weight), dtype=x.student.dtype)
        for s, t in zip(x.student.split(rows), x.teacher.split(rows), strict=True):
            torch.mm(s, x.weight.T, out=out[: len(s)])
            torch.mm(t, x.weight.T, out=out[: len(s)])
            if backward:
                torch.mm(out[: len(s)], x.weight)
