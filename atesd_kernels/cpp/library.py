"""Builds the C++ files with the machine's own compiler, once, and calls them.

The libraries lie in the user's cache, under a name that depends on sources, compiler, processor and torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LOG = logging.getLogger("atesd_kernels")
SOURCES = Path(__file__).parent
FLAGS = "-O3 -std=c++17 -march=native -fopenmp -shared -fPIC".split()
FLAGS += "-fno-fast-math -fno-math-errno -fno-trapping-math".split()  # functions.h needs the order of its sums
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    FLAGS.append("-mno-avx512f")  # ATEN_CPU_CAPABILITY=avx2 keeps torch from AVX-512, and this code too
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")  # compilers prefer half of it on processors with AVX-512
COMPILERS = ("g++", "clang++", "c++")
# The order of the cases in rows.cpp.
TERMS = (
    *("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha"),
)  # fmt: skip
# Rows of the head that `add_product` packs at a time. When tried, 2,048 were as fast (AMD, AVX-512) and 512 slower.
GROUP = 1024
VECTORS = ("value", "raw", "scale", "extreme", "c", "mean", "top", "lse", "entropy_s", "entropy_t")


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler: `CXX`, which may have arguments, or the first of COMPILERS here."""
    if own := shlex.split(os.environ.get("CXX", "")):
        return own if shutil.which(own[0]) else None
    return next(([found] for found in map(shutil.which, COMPILERS) if found), None)


@cache
def unavailable() -> str | None:
    """Returns why the C++ code cannot be built or loaded, or None if it can. Builds it at the first call."""
    if compiler() is None:
        wanted = os.environ.get("CXX") or f"among {', '.join(COMPILERS)}"
        return f"there is no C++ compiler {wanted} (install g++, or set CXX to one)"
    try:
        rows_library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"its C++ code could not be built: {_message(error)}"
    return None


@cache
def rows_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built("rows.cpp", ())))
    pointer, count, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool
    library.atesd_divergence.restype = flag
    library.atesd_divergence.argtypes = [
        *(count, flag, flag, flag, pointer, pointer, pointer, count, count, count),
        *(number, number, number, number, pointer, pointer, pointer),
    ]
    library.atesd_logprobs.restype = None
    library.atesd_logprobs.argtypes = [flag, pointer, pointer, count, count, count, number, pointer, pointer]
    return library


@cache
def product_library() -> ctypes.CDLL | None:
    """Returns the library of `product` and `add_product`. None if it cannot be built, if this torch does not export
    what it calls, or if the processor has no kernel for it."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(built("product.cpp", (f"-L{folder}", "-ltorch_cpu", f"-Wl,-rpath,{folder}"))))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.atesd_product.restype = ctypes.c_bool
    library.atesd_product.argtypes = [pointer, pointer, pointer, count, count, count, count]
    library.atesd_add_product.restype = ctypes.c_bool
    library.atesd_add_product.argtypes = [*(pointer, pointer, pointer, count, count, count, count), pointer, count]
    return library if _multiplies(library) else None


def _multiplies(library: ctypes.CDLL) -> bool:
    """Whether both products come out right for sizes that are no multiple of a block: 3 rows, 34 common entries, 6
    columns."""
    x, w, out = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((3, 34), (34, 6), (3, 6)))
    packed, out = torch.zeros(packed_rows(34), 6, dtype=torch.bfloat16), out.float()
    pointers = x.data_ptr(), w.data_ptr(), out.data_ptr()
    can = library.atesd_product(*pointers, 3, 6, 34, 6)  # w as [6, 34]
    can = can and library.atesd_add_product(*pointers, 3, 34, 6, 34, packed.data_ptr(), len(packed) // 2)
    return can and bool((out == 68).all())


def product(h: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Writes `h @ w.T` of bf16 matrices to `out`, in fp32: `[R, K]`, `[V, K]`, `[R, V]`. K must be even."""
    library, h, w = product_library(), h.contiguous(), w.contiguous()
    if not library.atesd_product(h.data_ptr(), w.data_ptr(), out.data_ptr(), *out.shape, h.shape[1], out.stride(0)):
        raise no_kernel(h, w)
    return out


def packed_rows(common: int) -> int:
    """Returns the rows of `add_product`'s memory: two groups. One is read while the other is written."""
    return 2 * min(GROUP, common + common % 2)


def add_product(g: Tensor, w: Tensor, acc: Tensor, packed: Tensor) -> None:
    """Adds `g @ w` of bf16 matrices to `acc`, contiguous fp32: `[R, C]`, `[C, K]`, `[R, K]`. The rows of `g` may lie
    apart. `packed`, bf16, is memory to work in: `[packed_rows(C), K]`."""
    library, w, (common, k) = product_library(), w.contiguous(), w.shape
    assert g.stride(1) == 1 or common == 1, g.stride()
    assert acc.is_contiguous() and acc.dtype == torch.float32 and packed.shape == (packed_rows(common), k)
    pointers, sizes = (g.data_ptr(), w.data_ptr(), acc.data_ptr()), (len(g), common, k, g.stride(0))
    if not library.atesd_add_product(*pointers, *sizes, packed.data_ptr(), len(packed) // 2):
        raise no_kernel(g, w)


def no_kernel(x: Tensor, w: Tensor) -> RuntimeError:
    """Returns the error to raise."""
    return RuntimeError(f"oneDNN has no kernel for the product of {tuple(x.shape)} and {tuple(w.shape)} in bf16")


def divergence(
    term: str, beta: float, s: Tensor, d: Tensor, out: Tensor | None, scale_s: float, scale_d: float,
    entry_clip: float | None, factor: Tensor | None, stats: bool,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Runs the rows of `s` and `d`, `[R, V]` fp32 with rows of one stride, which it overwrites.

    Writes the gradient by the scaled logits, times `factor` `[R]`, to `out`: fp32 or bf16, with rows as many bytes
    apart as those of `d`, in which it may lie. Without `factor`, `scale` is still missing in it. Returns the VECTORS
    `[R]`, and both models' most likely tokens `[2, R]`. Entropies and tokens are those of `stats` only.
    """
    rows, vocab = s.shape
    vectors = torch.empty(len(VECTORS), rows, dtype=torch.float32)
    tokens = torch.empty(2, rows, dtype=torch.long)
    rows_library().atesd_divergence(
        *(TERMS.index(term), entry_clip is not None, stats, out is not None and out.dtype == torch.bfloat16),
        *(s.data_ptr(), d.data_ptr(), _pointer(out), rows, vocab, s.stride(0), scale_s, scale_d, beta),
        *(0.0 if entry_clip is None else entry_clip, _pointer(factor), vectors.data_ptr(), tokens.data_ptr()),
    )
    return dict(zip(VECTORS, vectors, strict=True)), tokens


def logprobs(z: Tensor, out: Tensor | None, scale: float, factor: Tensor | None) -> Tensor:
    """Returns largest logit, log-sum-exp and entropy of each row of `z` `[R, V]` fp32: `[3, R]`.

    Writes the gradient of -lse by the scaled logits, times `factor` `[R]`, to `out`, whose rows are as many bytes apart
    as those of `z`, in which it may lie. Overwrites `z`.
    """
    vectors = torch.empty(3, len(z), dtype=torch.float32)
    bf16 = out is not None and out.dtype == torch.bfloat16
    rows_library().atesd_logprobs(
        bf16, z.data_ptr(), _pointer(out), *z.shape, z.stride(0), scale, _pointer(factor), vectors.data_ptr()
    )
    return vectors


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def built(source: str, libraries: tuple[str, ...]) -> Path:
    """Returns the shared library of `source`, which it compiles if the cache does not hold it."""
    own = compiler() or []
    command = [*own, *FLAGS, str(SOURCES / source)]
    path = _cache() / f"{Path(source).stem}-{_key(own, libraries)}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        LOG.warning("building %s once for this machine, which takes some seconds: %s", source, path)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", str(made), *libraries], check=True, capture_output=True, text=True)
            os.replace(made, path)  # processes that build at the same time do not meet
    return path


def _key(own: list[str], libraries: tuple[str, ...]) -> str:
    version = subprocess.run([*own, "--version"], check=True, capture_output=True, text=True).stdout
    lines = _processor().splitlines()  # "flags" on x86, "Features" on ARM
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    texts = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[hc]*"))]
    parts = (*texts, version, flags, torch.__version__, *FLAGS, *libraries)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else sys.platform


@cache
def _cache() -> Path:
    """The user's cache, or for a user without one a folder of this process that nobody else can write to."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atesd_kernels"
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except (OSError, RuntimeError):  # a read-only home, or none
        pass
    return Path(tempfile.mkdtemp(prefix="atesd_kernels-"))


def _message(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
