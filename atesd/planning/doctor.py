"""`atesd doctor`: reports versions, devices, and which backends work here and why the others do not.

Users paste this text into bug reports.
"""

from __future__ import annotations

import os
import platform
from importlib import util

from atesd import __version__
from atesd.models.smollm import FOLDER, default_cache_dir, is_complete
from atesd.planning.versions import installed_version
from atesd.reports.printout import Printout, Table

PACKAGES = (
    "torch triton transformers accelerate peft datasets reasoning-gym gguf safetensors "
    "liger-kernel flash-attn bitsandbytes vllm trl math-verify"
).split()
EXTRAS = {
    "triton": "gpu",
    "liger-kernel": "gpu",
    "flash-attn": "flash",
    "bitsandbytes": "4bit",
    "vllm": "vllm",
    "trl": "trl",
}


def describe() -> Printout:
    """Returns everything about this machine that affects a run, one line each."""
    import torch

    sections = {
        "atesd": {"atesd": __version__, "python": f"{platform.python_version()}, {platform.platform()}"},
        "packages": {name: version(name) for name in PACKAGES},
        "devices": devices(torch),
        "loss backends": loss_backends(torch),
        "rollout engines": {"hf": "available", "vllm": available("vllm", "vllm")},
        "quickstart model": {"smollm2": quickstart_model()},
    }
    return Printout([Table(title, [[*line] for line in lines.items()]) for title, lines in sections.items()], sections)


def version(package: str) -> str:
    extra = EXTRAS.get(package)
    missing = f"not installed (pip install 'atesd[{extra}]')" if extra else "not installed"
    return installed_version(package) or missing


def devices(torch) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cores} cores, torch uses {torch.get_num_threads()} threads, {cpu_capability(torch)}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "with bfloat16" if torch.cuda.is_bf16_supported() else "without bfloat16"
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found["gpu"] = "none: " + ("no usable device or driver" if built else "this torch is a CPU build")
    return found


def cpu_capability(torch) -> str:
    return torch.backends.cpu.get_cpu_capability()


def loss_backends(torch) -> dict[str, str]:
    """Returns, for each atesd_kernels backend, "available" or the reason why not."""
    from atesd_kernels.backends.matmul import multiplies_bf16
    from atesd_kernels.planning import BACKENDS, CPP, unavailable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {name: unavailable(name, device) for name in BACKENDS}
    found = {name: f"not available: {reason}" if reason else "available" for name, reason in reasons.items()}
    if reasons[CPP] is None:
        found[CPP] += ", what auto takes for large calls; " + (
            "bf16 products with fp32 results"
            if multiplies_bf16(2)
            else "bf16 products in fp32: no instructions for them, or torch's oneDNN cannot be called here"
        )
    elif device.type == "cpu":
        found[CPP] += ". So auto takes torch"
    return found


def available(package: str, extra: str) -> str:
    missing = util.find_spec(package) is None
    return f"not available: not installed (pip install 'atesd[{extra}]')" if missing else "available"


def quickstart_model() -> str:
    folder = default_cache_dir() / FOLDER
    return f"ready in {folder}" if is_complete(folder) else f"not fetched yet; the quickstart puts it in {folder}"
