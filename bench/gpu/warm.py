"""Compile what the stages will launch: `python -m bench.gpu.warm PART PARTS STAGES` does one part of it.

Compilers take minutes on one processor core and seconds on many, and Triton keeps what they make.
"""

from __future__ import annotations

import sys
import time

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


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
