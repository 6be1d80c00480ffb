"""`pytest bench`: every loss, every entrant, both precisions, as pytest-benchmark groups.

pytest-benchmark runs one test after another, which lets a noisy minute hurt one entrant alone. So a group is measured
once, interleaved round by round (`bench.loss_speed`), and each test hands its entrant's rounds to pytest-benchmark
through a clock that replays them.
"""

from __future__ import annotations

from functools import cache

import pytest

from bench import entrants, loss_speed, timing
from bench.entrants import DTYPES, LOSSES, OURS
from bench.loss_speed import PHASES
from bench.machine import native_precision, percent
from bench.shapes import HERE, Shape

pytest.importorskip("pytest_benchmark", reason="pip install 'atesd[bench]'")


class ReplayedClock:
    """A timer for pytest-benchmark that moves only by the seconds it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds) -> None:
        self.now += next(seconds)


CLOCK = ReplayedClock()
GEMMS = (timing.OWN_GEMMS, timing.MM_GEMMS)
CASES = [
    (shape, loss, dtype, name, phase)
    for shape in HERE
    for loss in LOSSES
    for dtype in DTYPES
    for phase in PHASES
    for name in [*entrants.names(loss), *(GEMMS if loss != "logprobs" else ())]
]
QUICK_TOKENS, QUICK_SECONDS = 512, 15  # no round of a phase begins after these seconds


@cache
def group(shape: Shape, loss: str, dtype: str, full: bool) -> dict:
    """Without --full the shapes are smaller, and nobody waits for a compiler."""
    if full:
        return loss_speed.measure(loss, dtype, shape=shape, rounds=5 if dtype == native_precision() else 3)
    tokens = loss_speed.tokens_for(dtype, QUICK_TOKENS)
    return loss_speed.measure(loss, dtype, tokens, rounds=3, compiled=False, shape=shape, budget=QUICK_SECONDS)


@pytest.mark.parametrize(
    ("shape", "loss", "dtype", "name", "phase"), CASES, ids=["-".join((c[0].name, *c[1:])) for c in CASES]
)
@pytest.mark.benchmark(timer=CLOCK)
def test_loss(benchmark, full, shape, loss, dtype, name, phase):
    if name in entrants.names(loss) and entrants.missing(name):
        pytest.skip(f"{name}: {entrants.missing(name)}")
    if not full and dtype == "bf16" != native_precision() and loss != LOSSES[0]:
        pytest.skip(f"{loss} bf16: only with --full on a processor without bf16 instructions, where it takes minutes")
    result = group(shape, loss, dtype, full)
    if name in result["failed"]:
        pytest.skip(f"{name}: {result['failed'][name]}")
    row = next(r for r in result["rows"] if r["entrant"] == name and r["phase"] == phase)
    benchmark.group = f"{shape.name}, {loss} {dtype}, N = {result['tokens']}, {phase}"
    benchmark.name = f"{name} (gradient error {percent((row['error'] or {}).get('gradient')) or 'n/a'})"
    benchmark.extra_info.update(error=row["error"])
    benchmark.pedantic(CLOCK.advance, args=(iter(row["rounds"]),), rounds=len(row["rounds"]))
    if name == OURS:  # a benchmark of wrong numbers is none
        assert row["error"]["gradient"] < (1e-4 if dtype == "fp32" else 1e-2)
