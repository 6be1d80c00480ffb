"""`pytest bench`: what the default run measures, what `--full` adds, and where results go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="every loss at N = 2048 with forward-only times and the compiled entrants, memory at every N",
    )


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


def pytest_terminal_summary(terminalreporter, config):
    from bench.machine import RESULTS

    if not config.option.collectonly:
        terminalreporter.write_line(f"results: {RESULTS}; `python -m bench.table --print` shows them as tables")
