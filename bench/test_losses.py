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
from bench.machine import percent

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
    (loss, dtype, name)
    for loss in LOSSES
    for dtype in DTYPES
    for name in [*entrants.names(loss), *(GEMMS if loss != "logprobs" else ())]
]


@cache
def group(loss: str, dtype: str, full: bool) -> dict:
    """Without --full the shapes are smaller, and nobody waits for a compiler."""
    if full:
        return loss_speed.measure(loss, dtype)
    tokens = loss_speed.TOKENS // (2 if loss == LOSSES[0] else 4)
    return loss_speed.measure(loss, dtype, tokens, rounds=3, phases=loss_speed.PHASES[:1], compiled=False)


@pytest.mark.parametrize(("loss", "dtype", "name"), CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.benchmark(timer=CLOCK)
def test_loss(benchmark, full, loss, dtype, name):
    if name in entrants.names(loss) and entrants.missing(name):
        pytest.skip(f"{name}: {entrants.missing(name)}")
    result = group(loss, dtype, full)
    if name in result["failed"]:
        pytest.skip(f"{name}: {result['failed'][name]}")
    row = next(r for r in result["rows"] if r["entrant"] == name and r["phase"] == loss_speed.PHASES[0])
    benchmark.group = f"{loss} {dtype}, N = {result['tokens']}, forward + backward"
    benchmark.name = f"{name} (gradient error {percent((row['error'] or {}).get('gradient')) or 'n/a'})"
    benchmark.extra_info.update(error=row["error"])
    benchmark.pedantic(CLOCK.advance, args=(iter(row["rounds"]),), rounds=len(row["rounds"]))
    if name == OURS:  # a benchmark of wrong numbers is none
        assert row["error"]["gradient"] < (1e-4 if dtype == "fp32" else 1e-2)
