"""The data sheets of the GPUs that kernels are compiled and steps are planned for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Published limits. `tflops` is dense bf16; `processors` are streaming multiprocessors, or compute units."""

    arch: str
    name: str
    tflops: float
    terabytes: float  # per second, HBM
    warp_size: int = 32
    registers: int = 65536  # 32-bit, per processor
    threads: int = 2048  # per processor
    shared: int = 163 << 10  # per block
    shared_total: int = 164 << 10  # per processor
    processors: int = 108


GPUS = (
    Gpu("sm_80", "A100 SXM", 312, 2.04),
    Gpu("sm_90", "H100 SXM", 989, 3.35, shared=227 << 10, shared_total=228 << 10, processors=132),
    Gpu("sm_100", "B200", 2250, 8.0, shared=227 << 10, shared_total=228 << 10, processors=148),
    # per compute unit: four SIMDs of 512 vector registers times 64 lanes, eight waves each
    Gpu("gfx942", "MI300X", 1307, 5.3, 64, 4 * 512 * 64, 2048, 64 << 10, 64 << 10, 304),
)
BY_ARCH = {gpu.arch: gpu for gpu in GPUS}
