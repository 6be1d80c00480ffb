"""The kernels as production launches them: argument types, constants, traffic; input of `compile_report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import tuning
from .kernels import logprobs, rows, terms, tiles

V = 151_936  # Qwen3's vocabulary
PATH_SHAPE = dict(N=8192, H=4096, V=128_256)  # the shape of the published H100 figures
BYTES = {"*fp32": 4, "*bf16": 2}

TYPES = {
    **dict.fromkeys(("MASK",), "*i1"),
    **dict.fromkeys(("PARTS", "SUMS", "STATS_OUT", "WEIGHT", "OUT"), "*fp32"),
    **dict.fromkeys(("BIAS_S", "BIAS_T", "BIAS"), "*bf16"),
    **dict.fromkeys(("stride_s", "stride_o", "stride_g", "V"), "i32"),
    **dict.fromkeys(("inv_t_s", "inv_t_t", "inv_t", "softcap", "entry_clip", "token_clip"), "fp32"),
    **dict.fromkeys(("slope", "grad_scale"), "fp32"),
    **dict.fromkeys(("A", "B", "W", "W_T"), "*bf16"),
    **dict.fromkeys(("ROWS", "COUNT"), "*i32"),
    **dict.fromkeys(("stride_a", "stride_b", "stride_w", "stride_w_t", "H", "H_T", "first", "sum_place"), "i32"),
    "TARGETS": "*i64",
}
FLAGS = dict(
    IS_DELTA=True, HAS_BIAS=False, HAS_SOFTCAP=False, HAS_TEMPERATURE=True, HAS_MASK=True, HAS_WEIGHT=True,
    HAS_ENTRY_CLIP=False, HAS_TOKEN_CLIP=False, HAS_TARGETS=True, STATS=False, SPLITS=1,
    SUM_SPLITS=1, BETA=0.5, SUM_U="sum", PRECISION="ieee",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    bytes_per_logit: int
    flops_per_logit: float = 0.0
    pointers: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    is_matmul: bool = False
    multiples_of_16: tuple[str, ...] = (
        "stride_s", "stride_o", "stride_g", "stride_a", "stride_b", "stride_w", "stride_w_t", "V", "H", "H_T", "first",
    )  # fmt: skip

    @property
    def types(self) -> dict[str, str]:
        types = {**TYPES, **self.pointers}
        return {name: types[name] for name in self.kernel.arg_names if name in types}

    def constants(self, arch: str) -> dict[str, Any]:
        tile = {k: v for k, v in self.tile(arch).constants.items() if k.isupper()}
        constants = {**FLAGS, "BLOCK": tuning.ROWS[arch].block, **tile, **self.flags}
        return {name: value for name, value in constants.items() if name in self.kernel.arg_names}

    def tile(self, arch: str) -> tuning.TileConfig:
        special = {"tile_accumulate": tuning.SECOND_PASS_TILES, "tile_scores": tuning.ONE_MODEL_TILES}
        return special.get(self.kernel.__name__, tuning.TILES)[arch]

    def num_warps(self, arch: str) -> int:
        return self.tile(arch).num_warps if self.is_matmul else tuning.ROWS[arch].num_warps

    def num_stages(self, arch: str) -> int:
        return self.tile(arch).num_stages if self.is_matmul else 2

    @property
    def bytes_per_row(self) -> float:
        return self.bytes_per_logit * V

    @property
    def flops_per_row(self) -> float:
        return self.flops_per_logit * V


def _row_cases() -> list[Case]:
    delta = {"S": "*fp32", "O": "*bf16", "G": "*bf16"}
    low = {"S": "*bf16", "O": "*bf16", "G": "*bf16"}
    separate = {"S": "*fp32", "O": "*fp32", "G": "*bf16"}
    stats = dict(STATS=True)
    both = dict(PHASE="both", TERM=terms.forward_kl, SUM_U="zero")
    cases = [
        Case("normalise, shared head", rows.normalise, 6, 0, delta),
        Case("normalise, shared head, stats", rows.normalise, 6, 0, delta, stats),
        Case("normalise, bf16 logits", rows.normalise, 4, 0, low),
        Case("normalise, separate heads", rows.normalise, 8, 0, separate, dict(IS_DELTA=False)),
        Case("KL and gradient, shared head", rows.accumulate, 8, 0, delta, both),
        Case("KL and gradient, shared head, stats", rows.accumulate, 8, 0, delta, {**both, **stats}),
        Case("KL and gradient, bf16 logits", rows.accumulate, 6, 0, low, both),
        Case("KL and gradient, separate heads", rows.accumulate, 10, 0, separate, {**both, "IS_DELTA": False}),
        Case(
            "KL and gradient, bias and softcap", rows.accumulate, 8, 0, delta,
            {**both, "HAS_BIAS": True, "HAS_SOFTCAP": True},
        ),
    ]  # fmt: skip
    for name in ("forward_kl", "reverse_kl", "jsd", "jeffreys", "skew_kl", "skew_reverse_kl", "total_variation"):
        term = dict(TERM=getattr(terms, name), HAS_ENTRY_CLIP=True, HAS_TOKEN_CLIP=True)
        cases.append(Case(f"{name}, both clips, sums", rows.accumulate, 6, 0, delta, {**term, "PHASE": "sum"}))
        cases.append(Case(f"{name}, both clips, gradient", rows.accumulate, 8, 0, delta, {**term, "PHASE": "grad"}))
    alpha = dict(TERM=terms.alpha_divergence)
    cases.append(Case("alpha, sums", rows.accumulate, 6, 0, delta, {**alpha, "PHASE": "sum"}))
    cases.append(Case("alpha, gradient", rows.accumulate, 8, 0, delta, {**alpha, "PHASE": "grad"}))
    one = {"S": "*fp32", "G": "*bf16"}
    cases.append(Case("log-prob normaliser", logprobs.normalise_one, 4, 0, one, stats))
    cases.append(Case("log-prob and gradient", logprobs.finish_logprob, 6, 0, one, dict(GRAD=True)))
    return cases


def _tile_cases() -> list[Case]:
    """Two products of 2 H FLOPs a logit; operands are read from L2, so only what leaves the chip is counted."""
    cases = []
    for hidden in (2048, 4096):
        size, work = f", H={hidden}", 4 * hidden
        g = {"G": "*bf16"}
        kl = dict(TERM=terms.forward_kl, SUM_U="zero", PHASE="both")
        clipped = dict(TERM=terms.jsd, PHASE="grad", HAS_ENTRY_CLIP=True, HAS_TOKEN_CLIP=True)
        for name, kernel, traffic, flags in (
            ("tiles: statistics", tiles.tile_normalise, 0, {}),
            ("tiles: statistics, stats", tiles.tile_normalise, 0, dict(STATS=True)),
            ("tiles: statistics, separate heads", tiles.tile_normalise, 0, dict(IS_DELTA=False)),
            ("tiles: KL and gradient", tiles.tile_accumulate, 2, kl),
            ("tiles: jsd sums, clips, stats", tiles.tile_accumulate, 0, {**clipped, "PHASE": "sum", "STATS": True}),
            ("tiles: jsd gradient, clips", tiles.tile_accumulate, 2, clipped),
            ("tiles: log-prob", tiles.tile_scores, 0, dict(GRAD=False)),
            ("tiles: log-prob gradient", tiles.tile_scores, 2, dict(GRAD=True)),
        ):
            flops = work // 2 if kernel is tiles.tile_scores else work
            cases.append(Case(name + size, kernel, traffic, flops, g, flags, is_matmul=True))
    return cases


CASES = _row_cases() + _tile_cases()

# path, GEMMs in units of U = 2 N H V, row kernels' bytes per logit pair, and the most they may be
PATHS = (
    ("KL, frozen head", 3, 14, 14),
    ("KL, trained head", 4, 14, 14),
    ("other or clipped, frozen head", 3, 20, 20),
    ("other or clipped, trained head", 4, 20, 20),
    ("KL, trained head, logits_dtype=bf16", 4, 10, 10),
    ("other or clipped, trained head, logits_dtype=bf16", 4, 14, 14),
    ("KL, separate heads, trained", 4, 18, None),
)


def path_table(gpus, out, faults: list[str]) -> None:
    """How a whole call's time is made up, at peak rates and at 70 % of the tensor cores' (what good GEMMs reach)."""
    N, H, V = (PATH_SHAPE[k] for k in "NHV")
    out(f"Roofline of backend triton at N={N:,}, H={H:,}, V={V:,} (computed; not yet measured on a GPU)")
    columns = ("path", "GPU", "GEMMs (U)", "B/logit pair, limit", "GEMMs ms (at 70 %)", "row kernels ms", "dW ms")
    out(f"| {' | '.join(columns)} | total ms at 70 % |")
    out("|---" * 8 + "|")
    for name, units, traffic, limit in PATHS:
        for gpu in gpus:
            gemm = units * 2 * N * H * V / gpu.tflops / 1e9
            row = traffic * N * V / gpu.terabytes / 1e9
            # dW: zeroed, per chunk of 4,096 rows a product written and added, cast once
            head = (4 + 16 * -(-N // 4096) + 6) * H * V / gpu.terabytes / 1e9 if units == 4 else 0.0
            out(
                f"| {name} | {gpu.name} | {units} | {traffic}, {limit or '-'} | {gemm:.1f} ({gemm / 0.7:.1f}) "
                f"| {row:.1f} | {head:.1f} | {gemm / 0.7 + row + head:.1f} |"
            )
        if limit is not None and traffic > limit:
            faults.append(f"{name}: {traffic} bytes per logit pair, the limit is {limit}")
