"""Which precision and which products are fast here. Separate because the answer is the processor's.

Every processor can multiply bfloat16; one without instructions for it takes several times as long as in float32. And
torch has two libraries for float32 products on a CPU, of which it uses the slower one on some.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from atesd.config import ATESDConfig
from atesd_kernels.backends import matmul

CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86-64's, and Arm's name for its own


def has_fast_bf16() -> bool:
    """Whether the device a run would use multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.12
    if not capabilities:
        return torch.cpu._is_avx512_bf16_supported()
    return any(capabilities.get(name) for name in CPU_INSTRUCTIONS)


def settle_precision(config: ATESDConfig) -> None:
    """Where `config.bf16` is absent, decide it for this machine: what is saved and resumed is the decision."""
    if config.bf16 is None:
        config.bf16 = has_fast_bf16()


def fast_fp32_products(device: torch.device) -> AbstractContextManager[None]:
    """A context in which float32 products on a CPU are oneDNN's, where those are full float32 ones.

    With AVX-512 they take half the time of torch's own on AMD. torch's switch for them is named for something else: it
    allows oneDNN to round to bfloat16, which it does on processors with tiles for that alone (AMX). Not for decoding,
    whose few rows are slower that way.
    """
    exact = device.type == "cpu" and matmul.onednn_keeps_fp32()
    return matmul.low_precision_products() if exact else nullcontext()
