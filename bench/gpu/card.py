"""Stage 1: which GPU this is, and its two ceilings: bytes a second of a copy, FLOPs a second of a product."""

from __future__ import annotations

import statistics
import subprocess
from functools import partial

import torch

from bench import machine
from bench.gpu.clock import milliseconds
from bench.gpu.stage import Stage


def run(stage: Stage) -> None:
    stage.keep(card=card(), machine=machine.machine(), versions=machine.versions())
    size, cube = (1 << 20, 256) if stage.dry else (2 << 30, 8192)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=stage.device).normal_()
    target = torch.empty_like(source)
    copies = milliseconds(partial(target.copy_, source), rounds=10)
    moved = 2 * source.numel() * source.itemsize  # read and written
    stage.keep(copy_bytes_per_second=moved / statistics.median(copies) * 1e3, copy_bytes=moved)
    del source, target
    a, b = (torch.randn(cube, cube, dtype=torch.bfloat16, device=stage.device) for _ in range(2))
    products = milliseconds(lambda: a @ b, rounds=10)
    stage.keep(product_flops_per_second=2 * cube**3 / statistics.median(products) * 1e3, product_cube=cube)


def card() -> dict:
    if not torch.cuda.is_available():
        return {"name": "no GPU (dry run)"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def table(result: dict) -> str:
    c = result["card"]
    return (
        f"{c['name']}, driver {c.get('driver', '-')}, CUDA {c.get('cuda', '-')}: "
        f"copy {result['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written), "
        f"{result['product_cube']}-cube bf16 product {result['product_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
