"""Compile what the stages will launch: `python -m bench.gpu.warm PART PARTS MODULES` does one part of it.
`python -m bench.gpu.warm --compile-only headline` does it for sm_90 without a GPU, and fails where it cannot.

Compilers take minutes on one processor core and seconds on many, and Triton keeps what they make.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable

from atesd_kernels.tools.compile_only import compile_only
from bench.gpu.clock import first_line


def calls(modules: Iterable[str]) -> list[Callable[[], object]]:
    return [call for name in modules for call in importlib.import_module(f"bench.gpu.{name}").warm()]


def main(part: int, parts: int, modules: Iterable[str]) -> None:
    start = time.monotonic()
    for call in calls(modules)[part::parts]:
        try:
            call()
        except Exception as error:  # the stage that launches it will say so too
            print(f"[warm] {call}: {first_line(error)}", flush=True)
    print(f"[warm] part {part + 1} of {parts}: {time.monotonic() - start:.0f} s", flush=True)


def without_gpu(modules: Iterable[str]) -> None:
    compiled = compile_only("sm_90")
    for call in calls(modules):
        call()
    print(f"{len(compiled)} specialisations compiled for {compiled.arch}")


if __name__ == "__main__":
    if sys.argv[1] == "--compile-only":
        without_gpu(sys.argv[2:])
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
