"""Whether freed memory is kept or given back, and compiled products with it, in processes of their own: these settings
are a process's."""

import subprocess
import sys

import pytest

from atesd.models.memory import glibc

pytestmark = pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")

PAGES = 51_200  # of 4 KiB: 200 MiB
SCRIPT = """
import resource
import torch
from atesd.models.memory import FreedMemory

def faults_of(tensors, size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(size) for _ in range(tensors)]
    if {pin}:  # behind them: the heap does not shrink of itself
        pins.append(torch.ones(1024))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory, pins = FreedMemory(keep={keep}), []
for _ in range(3):  # the heap has taken its shape
    faults_of({tensors}, {size})
if {release}:
    memory.release()
print(faults_of({tensors}, {size}))
"""
LARGE = {"tensors": 20, "size": 10 * 2**20, "pin": False}  # 40 MiB each: glibc would map and unmap each of them
SMALL = {"tensors": 3200, "size": 2**14, "pin": True}  # 64 KiB each: these it keeps


def faults(keep: bool, release: bool, tensors: int, size: int, pin: bool) -> int:
    script = SCRIPT.format(keep=keep, release=release, tensors=tensors, size=size, pin=pin)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_kept_memory_is_used_again_without_a_page_fault():
    assert faults(keep=True, release=True, **LARGE) < 4 * PAGES / 10  # of 800 MiB; the heap may grow by a tensor
    assert faults(keep=True, release=True, **SMALL) < PAGES / 10


def test_memory_not_kept_is_back_with_the_system_after_a_phase():
    assert faults(keep=False, release=True, **SMALL) > PAGES / 2
    assert faults(keep=False, release=False, **SMALL) < PAGES / 10  # without release the C library would keep it


PRODUCTS = """
import torch
from atesd.models.memory import bound_product_caches

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def train(lengths):
    for length in lengths:
        q, kv = (torch.zeros(1, 3, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        torch.nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True).sum().backward()

if {bound}:
    bound_product_caches()
train(range(400, 280, -1))  # the longest first: memory of its own sizes is there from here on
before = resident()
train(range(280, 160, -1))
print(resident() - before)
"""


def growth(bound: bool) -> int:
    script = PRODUCTS.format(bound=bound)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_code_compiled_for_sequences_of_one_length_does_not_stay_with_a_run():
    unbound = growth(bound=False)
    if unbound < 20e6:
        pytest.skip("oneDNN compiles nothing for these products on this processor")
    assert growth(bound=True) < unbound / 4
