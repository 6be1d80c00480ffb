"""Compile what the stages will launch: `python -m bench.gpu.warm PART PARTS STAGES` does one part of it.
`python -m bench.gpu.warm --compile-only 3` does it for sm_90 without a GPU, and fails where a kernel does not compile.

Compilers take minutes on one processor core and seconds on many, and Triton keeps what they make.
"""

from __future__ import annotations

import sys
import time

from atesd_kernels.tools.compile_only import compile_only
from bench.gpu import headline, kernels, step
from bench.gpu.clock import first_line

# Kernels are the same for every hidden size, and for every vocabulary divisible by 16: stage 5 launches stage 3's.
WARMED = {3: headline, 4: kernels, 5: headline, 6: step}


def calls(stages: set[int]) -> list:
    modules = dict.fromkeys(module for stage, module in WARMED.items() if stage in stages)
    return [call for module in modules for call in module.warm()]


def main(part: int, parts: int, *stages: int) -> None:
    start = time.monotonic()
    for call in calls(set(stages))[part::parts]:
        try:
            call()
        except Exception as error:  # the stage that launches it will say so too
            print(f"[warm] {call}: {first_line(error)}", flush=True)
    print(f"[warm] part {part + 1} of {parts}: {time.monotonic() - start:.0f} s", flush=True)


def without_gpu(*stages: int) -> None:
    compiled = compile_only("sm_90")
    for call in calls(set(stages)):
        call()
    print(f"{len(compiled)} specialisations compiled for {compiled.arch}")


if __name__ == "__main__":
    if sys.argv[1] == "--compile-only":
        without_gpu(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
