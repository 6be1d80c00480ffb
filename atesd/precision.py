"""Whether bfloat16 is fast here. Separate because the answer is the processor's, and a run's settings are settled once.

Every processor can multiply bfloat16; one without instructions for it takes several times as long as in float32.
"""

from __future__ import annotations

import torch

from atesd.config import ATESDConfig

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
