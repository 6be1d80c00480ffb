"""Plans chunk shapes for a byte budget, and chooses the backend for a device.

The chunk of logits is the only vocabulary-sized temporary of an operator. A byte budget (`chunk_bytes`) bounds it for
any number of tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

MIB = 1 << 20
COMPILED = "torch_compiled"
CPP = "cpp"
TORCH = ("torch", COMPILED, CPP)  # one form of the losses, in three speeds
BACKENDS = (*TORCH, "triton")

# Evaluated once, at import: torch 2.11's Dynamo cannot trace find_spec, and users compile functions that need it.
# find_spec does not import triton.
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed (pip install triton)"

# Our choice. CPU: enough rows for the GEMMs to run at full speed (bench/chunk_size.py), with 5 % of the memory of dense
# logits at N = 2048, V = 49,152. GPU: 1,024 rows of a 152k vocabulary in fp32 S and bf16 D take 0.9 GiB. Backend
# "triton" has a budget in rows (gpu_chunk_bytes).
DEFAULT_CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 1024 * MIB}

# Our choice: from this many pairs of token and vocabulary entry on, "auto" takes "cpp" on a CPU. A step has some such
# calls, and they soon pay for the seconds that its compiler takes once on a machine.
CPP_PAIRS = 1 << 22

# CPU only. One GEMM computes a block of the vocabulary. The elementwise passes process tiles: a few rows of a block,
# which fit the processor's cache.
CPU_BLOCK_COLUMNS = 4096
CPU_TILE_ROWS = 128
GPU_BLOCK_COLUMNS = 16_384  # backend "torch" on a GPU: bounds the temporaries of the eager passes


def default_chunk_bytes(device: torch.device) -> int:
    return DEFAULT_CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


@dataclass(frozen=True)
class ChunkPlan:
    """Sizes of the torch backend's chunks, blocks and tiles of `[rows, vocab]`."""

    rows: int  # rows of a chunk
    columns: int  # vocabulary entries of a block
    tile_rows: int  # rows of a tile within a block

    @staticmethod
    def make(
        num_rows: int,
        vocab: int,
        bytes_per_logit: int,
        device: torch.device,
        chunk_bytes: int | None,
        block_bytes: int = 0,
        one_tile_per_block: bool = False,
    ) -> ChunkPlan:
        """Returns a plan within `chunk_bytes`. A row costs `bytes_per_logit` per entry, and `block_bytes` in one block.

        `one_tile_per_block` makes each block one tile: compiled passes keep intermediate values in registers.
        """
        budget = chunk_bytes or default_chunk_bytes(device)
        columns = min(vocab, CPU_BLOCK_COLUMNS if device.type == "cpu" else GPU_BLOCK_COLUMNS if block_bytes else vocab)
        rows = max(1, min(num_rows, budget // (bytes_per_logit * vocab + block_bytes * columns)))
        if num_rows:
            # equal chunks: the GEMMs of a last chunk of three rows would run at a tenth of the speed
            most, rows = rows, -(-num_rows // -(-num_rows // rows))
            if device.type != "cpu" and rows < num_rows:
                rows = aligned_rows(rows, most, num_rows)
        return ChunkPlan(rows, columns, rows if one_tile_per_block or device.type != "cpu" else CPU_TILE_ROWS)

    def row_chunks(self, num_rows: int):
        return (slice(i, min(i + self.rows, num_rows)) for i in range(0, num_rows, self.rows))

    def blocks(self, vocab: int) -> list[slice]:
        return [slice(j, min(j + self.columns, vocab)) for j in range(0, vocab, self.columns)]

    def tiles(self, num_rows: int):
        return (slice(i, min(i + self.tile_rows, num_rows)) for i in range(0, num_rows, self.tile_rows))


def aligned_rows(rows: int, most: int, num_rows: int) -> int:
    """Returns a GPU chunk's `rows`, rounded to a multiple of 128 (the GEMM's tile), else of 16: that keeps per-row
    tensors aligned, and Triton recompiles a kernel for each alignment. Unrounded if neither fits into `most`, or if the
    last chunk would have less than a quarter of the others' rows."""
    for unit, least in ((128, 512), (16, 16)):
        for rounded in (-(-rows // unit) * unit, rows // unit * unit):
            last = num_rows % rounded if rounded else 0
            if least <= rounded <= most and (last == 0 or 4 * last >= rounded):
                return rounded
    return rows


def chunk_plan(spec, source, num_rows: int, buffers: int, in_cpp: bool) -> ChunkPlan:
    """Returns the torch backend's plan for `buffers` of the chunk's size, and the temporaries of a block: those of the
    passes, or with `in_cpp` both models' products."""
    itemsize = source.dtype.itemsize
    rows_bytes, block_bytes = buffers * itemsize, 4 * itemsize
    if in_cpp:
        block_bytes = 2 * source.s_dtype.itemsize
    plan = ChunkPlan.make(
        *(num_rows, source.vocab, rows_bytes, source.device, spec.chunk_bytes),
        block_bytes=block_bytes + source.mixing_bytes,
        one_tile_per_block=spec.compiled,
    )
    return replace(plan, rows=source.shards.all_reduce_min(plan.rows, source.device))


def gpu_chunk_bytes(num_rows: int, vocab: int, bytes_per_logit: int, trained_head: bool, memory: int | None) -> int:
    """Returns backend "triton"'s default budget: 1,024 to 2,047 rows, within an eighth of the GPU's memory (or 1 GiB if
    that is more). A trained head takes 4,096 to 8,191 rows: each chunk reads and writes its gradient once.

    `memory` is in bytes: `gpu_memory()`, or that of a GPU to plan for. None gives the CPU's budget.
    """
    if memory is None:
        return DEFAULT_CHUNK_BYTES["cpu"]
    chunks = max(1, num_rows // (4096 if trained_head else 1024))
    rows = -(-num_rows // chunks // 128) * 128  # a multiple of the GEMM's tile
    return min(rows * vocab * bytes_per_logit, max(memory // 8, DEFAULT_CHUNK_BYTES["cuda"]))


def gpu_memory(device: torch.device) -> int | None:
    """Returns the memory of the GPU in bytes; None without a GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def unavailable(backend: str, device: torch.device) -> str | None:
    """Returns why `backend` cannot run on `device`, or None if it can."""
    if backend == "torch":
        return None
    if backend == CPP:
        if device.type != "cpu":
            return f"it runs on a CPU, got {device}"
        from .cpp import library

        # torch.compile cannot trace the search for a compiler, nor its run
        return None if torch.compiler.is_compiling() else library.unavailable()
    if backend == COMPILED:
        if device.type != "cpu":
            return None if HAS_TRITON else NO_TRITON
        # torch.compile cannot trace the search for a compiler; while it runs, there is one
        return None if torch.compiler.is_compiling() else _no_compiler()
    if not HAS_TRITON:
        return NO_TRITON
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA or ROCm device, got {device} (TRITON_INTERPRET=1 interprets it on a CPU)"
    return None


@cache
def _no_compiler() -> str | None:
    """Returns why Inductor cannot compile for the CPU, or None if it can."""
    from torch._inductor import config, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return f"torch.compile finds no C++ compiler among {config.cpp.cxx} (install g++ or clang++, or set CXX)"
    return None


FUNCTIONS = ("divergence_rows", "divergence_logits", "logprob_rows")  # of `backends.Backend`
VIEWS = "divergence_views"  # of `backends.MixingBackend`


@cache
def own_backend(name: str) -> Any:
    """Imports a caller's backend, `"module:object"`.

    Raises:
        ValueError: if it cannot be imported, or lacks a function of `backends.Backend`.
    """
    module, _, attribute = name.partition(":")
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"backend {name!r} cannot be imported ({error}); pass 'module:object' of your own.") from error
    missing = [function for function in FUNCTIONS if not callable(getattr(backend, function, None))]
    if missing:
        raise ValueError(f"backend {name!r} lacks {', '.join(missing)}; see atesd_kernels.backends.Backend.")
    return backend


def require_views(backend: str) -> None:
    """Checks that `backend` mixes several views of a teacher: all of this package do, a caller's own may.

    Raises:
        ValueError: if it has no such function.
    """
    if ":" not in backend or torch.compiler.is_compiling():  # torch.compile cannot trace an import
        return
    if not callable(getattr(own_backend(backend), VIEWS, None)):
        raise ValueError(
            f"backend {backend!r} has no {VIEWS}, which several views of a teacher (teacher_mix) need; see "
            "atesd_kernels.backends.MixingBackend, or use backend='torch'."
        )


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, has_triton_twin: bool, pairs: int = 0
) -> str:
    """Returns the backend to use: resolves `"auto"`, or checks an explicit choice. `pairs`: tokens times vocabulary.

    Raises:
        ValueError: if the backend is unknown or cannot run this call; the message gives the reason.
    """
    if backend == "auto":
        if device.type == "cpu" and not torch.compiler.is_compiling() and pairs >= CPP_PAIRS:
            return "torch" if dtype == torch.float64 or unavailable(CPP, device) else CPP
        fits = device.type == "cuda" and dtype != torch.float64 and has_triton_twin
        return "triton" if fits and unavailable("triton", device) is None else "torch"
    if ":" in backend:
        if not torch.compiler.is_compiling():  # torch.compile cannot trace an import; the operator imports it again
            own_backend(backend)
        return backend
    if backend == "triton_tiled":
        raise ValueError(
            "backend 'triton_tiled' was retired: on an H200 it took 6.5 times as long as 'triton', and 3 times as long "
            "without gradients. Use backend='triton', with a smaller chunk_bytes where memory is short."
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}, or module:object.")
    reason = unavailable(backend, device)
    if reason is None and backend not in TORCH and dtype == torch.float64:
        reason = "it has no float64 path; use backend='torch'"
    if reason is None and backend not in TORCH and not has_triton_twin:
        reason = "this divergence has no Triton function (DivergenceTerm.triton); use backend='torch'"
    if reason is not None:
        raise ValueError(f"backend {backend!r} is not available: {reason}.")
    return backend
