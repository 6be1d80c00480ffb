"""pytest plugin: what the GPU suite would launch is compiled for sm_90, and nothing runs.

    python -m pytest -p tests.kernels.compiled_only --noconftest tests/kernels/test_triton_gpu.py

Results are whatever the memory held, so every comparison of numbers passes here. A kernel that does not compile fails
its test, and a run that compiles fewer kernels than it has tests fails as a whole.
"""

from __future__ import annotations

import traceback

import pytest

from atesd_kernels.tools.compile_only import compile_only

COMPILED = compile_only("sm_90")


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        module.relative = lambda value, expected: 0.0  # a test goes on to its next launch


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)
        if not any("/triton/" in frame.filename for frame in where):
            return True  # of numbers that nothing computed
        raise


def pytest_sessionfinish(session):
    if len(COMPILED) < session.testscollected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(COMPILED)} specialisations compiled for {COMPILED.arch}")
