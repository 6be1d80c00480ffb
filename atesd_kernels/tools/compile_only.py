"""Compile what a GPU would be asked to launch, on a machine that has none.

    compiled = compile_only("sm_90")     # from here on, in this process
    linear_divergence(..., backend="triton")
    compiled.kernels                     # what the call would have launched

`compile_report` compiles chosen cases; this follows real calls, with the arguments' types and divisibility that Triton
specialises on. Nothing runs: results are whatever the memory held. Kernels go to Triton's cache, where a GPU with the
same Triton finds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .. import planning
from ..backends import matmul, tuning

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


@dataclass
class Compiled:
    """What was compiled since `compile_only`."""

    arch: str
    kernels: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # hash -> Triton's source and metadata

    def __len__(self) -> int:
        return len(self.kernels)


def compile_only(arch: str = "sm_90") -> Compiled:
    """Make this process compile Triton launches for `arch` instead of running them.

    For tools and tests: it replaces Triton's driver, and this package's questions to the GPU, for good. Call it before
    anything is launched. `TRITON_INTERPRET` must not be set.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    compiled = Compiled(arch)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    class Utilities:
        def load_binary(self, *_: Any) -> tuple[str, str, int, int, int]:
            return "module", "function", 0, 0, 1024  # registers, spills, most threads

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_BYTES[arch], "multiprocessor_count": MULTIPROCESSORS[arch]}

    class Launcher:
        def __init__(self, source: Any, metadata: Any):
            compiled.kernels[metadata.hash] = (source, metadata)

        def __call__(self, *_: Any) -> None:
            pass

    class Driver:
        utils, launcher_cls = Utilities(), Launcher

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    driver.set_active(Driver())
    planning.unavailable = lambda backend, device: None
    planning.gpu_memory = lambda device: 80 << 30
    tuning.architecture = lambda device: arch
    tuning.num_processors = lambda device: MULTIPROCESSORS[arch]
    matmul.torch = WideTorch()
    return compiled


class WideTorch:
    """torch, whose two products take on a CPU, too, the arguments that only a GPU's have."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def mm(self, *tensors, out_dtype=None, out=None) -> torch.Tensor:
        return self.product(torch.mm, tensors, out_dtype, out)

    def addmm(self, *tensors, out_dtype=None, out=None) -> torch.Tensor:
        return self.product(torch.addmm, tensors, out_dtype, out)

    @staticmethod
    def product(function, tensors, out_dtype, out) -> torch.Tensor:
        result = function(*tensors) if out_dtype is None else function(*(t.to(out_dtype) for t in tensors))
        return result if out is None else out.copy_(result)
