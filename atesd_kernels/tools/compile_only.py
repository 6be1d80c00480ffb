"""Compiles the kernels that a GPU would launch, on a machine without one.

    compiled = compile_only("sm_90")     # affects this process from here on
    linear_divergence(..., backend="triton")
    compiled.kernels                     # the kernels this call would have launched

`compile_report` compiles chosen cases. This compiles real calls, with the argument types and divisibility on which
Triton specialises. No kernel runs, so results are uninitialised memory. Kernels go to Triton's cache, for later use on
a GPU with the same Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .. import planning
from ..backends import matmul, tuning
from .gpus import BY_ARCH


@dataclass
class CompiledKernels:
    """Kernels compiled since `compile_only`."""

    arch: str
    kernels: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # hash -> Triton's source and metadata

    def __len__(self) -> int:
        return len(self.kernels)


def compile_only(arch: str = "sm_90") -> CompiledKernels:
    """Makes this process compile Triton launches for `arch` instead of running them. Returns the compiled kernels.

    For tools and tests only: it permanently replaces Triton's driver and this package's GPU queries. Call it before
    the first launch. `TRITON_INTERPRET` must not be set.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    compiled, gpu = CompiledKernels(arch), BY_ARCH[arch]
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    class Utilities:
        def load_binary(self, *_: Any) -> tuple[str, str, int, int, int]:
            return "module", "function", 0, 0, 1024  # registers, spills, most threads

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": gpu.shared, "multiprocessor_count": gpu.processors}

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
    tuning.num_processors = lambda device: gpu.processors
    matmul.torch = WideTorch()
    return compiled


class WideTorch:
    """torch, with a `mm` and `addmm` that accept GPU-only arguments on a CPU."""

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
