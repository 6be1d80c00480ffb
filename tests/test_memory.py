"""Whether freed memory is kept or given back, in processes of their own: the C library's settings are a process's."""

import subprocess
import sys

import pytest

from atesd.memory import glibc

pytestmark = pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")

SCRIPT = """
import resource
from pathlib import Path
import torch
from atesd.memory import FreedMemory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def faults_of(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(2**20) for _ in range(tensors)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory = FreedMemory(keep={keep})
for _ in range(3):  # the heap has taken its shape
    faults_of(50)
kept = resident()
memory.release()
released = resident()
print(faults_of(50), kept - released)
"""


def run(keep: bool) -> tuple[float, float]:
    out = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], capture_output=True, text=True, check=True)
    faults, given_back = map(float, out.stdout.split())
    return faults, given_back


def test_kept_memory_is_used_again_without_a_page_fault():
    faults, given_back = run(keep=True)
    assert faults < 51_200 / 10  # of the 51,200 pages of 4 KiB; the heap may grow by a few tensors
    assert given_back < 1


def test_memory_not_kept_is_back_with_the_system():
    faults, _ = run(keep=False)
    assert faults > 10_000  # every page again
