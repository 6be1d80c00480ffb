"""pytest plugin: what the GPU suite would launch is compiled for sm_90, and nothing runs.

    python -m pytest -p tests.kernels.compiled_only --noconftest tests/kernels/test_triton_gpu.py

Results are whatever the memory held, so a wrong number passes here. A kernel that does not compile fails its test.
"""

from __future__ import annotations

import pytest

from atesd_kernels.compile_only import compile_only

COMPILED = compile_only("sm_90")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except AssertionError:
        return True  # of a number, which nothing computed


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(COMPILED)} specialisations compiled for {COMPILED.arch}")
