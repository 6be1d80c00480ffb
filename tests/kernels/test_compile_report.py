"""That the compile report's check can fail. Compiling takes seconds: one row kernel, one GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

from atesd_kernels.tools.compile_cases import CASES

ROOT = Path(__file__).parents[2] / "atesd_kernels"

SCRIPT = """
from dataclasses import replace
from atesd_kernels.tools.compile_report import CASES, GPUS, compile_case
h100 = next(gpu for gpu in GPUS if gpu.arch == "sm_90")
case = next(case for case in CASES if case.name == "KL and gradient, shared head")
print(compile_case(case, h100).faults())
print(compile_case(replace(case, multiples_of_16=()), h100).faults())
print(replace(compile_case(case, h100), spills=3, shared=1 << 20).faults())
print(replace(compile_case(case, h100), case=replace(case, is_matmul=True)).faults())
costly = next(case for case in CASES if case.name == "jsd, both clips, sums")
print(*(compile_case(each, h100).instructions_per_entry for each in (case, costly)))
"""


def test_every_kernel_a_launch_names_is_in_the_report():
    """Kernels are called with a grid, `kernel[grid](...)`; helpers are called by kernels."""
    sources = [path.read_text() for path in (ROOT / "backends").glob("triton_*.py")]
    launched = {name for source in sources for name in re.findall(r"_kernels\.(\w+)\[", source)}
    assert len(launched) == 10
    assert launched == {case.kernel.__name__ for case in CASES}


def test_spills_scalar_loads_missing_tensor_cores_and_too_much_shared_memory_are_faults():
    # a process of its own: here the kernels are interpreted
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
    sound, unaligned, greedy, slow, instructions = done.stdout.splitlines()
    assert sound == "[]"
    assert "loads of 32 bits or less in a loop" in unaligned
    assert "3 spill instructions" in greedy and "bytes of shared memory" in greedy
    assert "no tensor-core instructions" in slow
    # a KL and its gradient must leave its kernel bound by memory; a mixture's logarithm costs as much again
    kl, jsd = map(float, instructions.split())
    assert 25 < kl < 45 < jsd < 85
