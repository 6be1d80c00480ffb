"""Compile what the stages will launch: `python -m bench.gpu.warm PART PARTS` does one part of it.

Compilers take minutes on one processor core and seconds on many, and Triton keeps what they make.
"""

from __future__ import annotations

import sys
import time

from bench.gpu import headline, kernels, step
from bench.gpu.clock import first_line


def calls() -> list:
    """Of all stages: kernels are the same for every hidden size, and for every vocabulary divisible by 16."""
    return [*headline.warm(), *kernels.warm(), *step.warm()]


def main(part: int, parts: int) -> None:
    start = time.monotonic()
    for call in calls()[part::parts]:
        try:
            call()
        except Exception as error:  # the stage that launches it will say so too
            print(f"[warm] {call}: {first_line(error)}", flush=True)
    print(f"[warm] part {part + 1} of {parts}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
