"""`pytest bench`: what the default run measures, what `--full` adds, where results go, and the tables at the end."""

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
        help="the tables of bench/README.md: full shapes, entrants that wait for a compiler, the training step. Hours; "
        "results go to bench/results. Without it, minutes, and they go to bench/results/quick",
    )


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


def pytest_configure(config):
    from bench import machine, progress

    if not config.getoption("--full"):
        machine.RESULTS = machine.QUICK
    capture = config.pluginmanager.getplugin("capturemanager")

    def past_the_capture(line: str) -> None:
        with capture.global_and_fixture_disabled():
            progress.to_stderr(line)

    progress.write = past_the_capture


def pytest_terminal_summary(terminalreporter, config):
    from bench import machine, table

    if not config.option.collectonly:
        terminalreporter.write_line(table.every_table())
        terminalreporter.write_line(f"results: {machine.RESULTS}")
