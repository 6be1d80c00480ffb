"""Chooses the precision and the matmul library that are fast on this processor.

Every processor can multiply bfloat16, but without bfloat16 instructions it is several times slower than float32. For
float32 matmuls on a CPU, torch has two libraries, and on some processors it uses the slower one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from atesd.config import ATESDConfig
from atesd_kernels.backends import matmul

CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the first two are x86-64, the last is Arm


def has_fast_bf16() -> bool:
    """Whether the device that a run would use has bfloat16 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.12
    if not capabilities:
        return torch.cpu._is_avx512_bf16_supported()
    return any(capabilities.get(name) for name in CPU_INSTRUCTIONS)


def settle_precision(config: ATESDConfig) -> None:
    """Sets `config.bf16` for this machine if it is None. The run saves and resumes with the resolved value."""
    if config.bf16 is None:
        config.bf16 = has_fast_bf16()


def fast_fp32_products(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context that uses oneDNN for float32 matmuls on a CPU, if oneDNN computes them in full float32.

    On AMD with AVX-512 this halves the time. torch's switch for it is named after a different effect: it allows oneDNN
    to round to bfloat16, which oneDNN does only on processors with AMX. Do not use it for decoding, where the few rows
    make oneDNN slower.
    """
    exact = device.type == "cpu" and matmul.onednn_keeps_fp32()
    return matmul.low_precision_products() if exact else nullcontext()
