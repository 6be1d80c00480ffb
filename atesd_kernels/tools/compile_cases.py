"""The kernels' production launches (argument types, constants, traffic), as input for `compile_report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..backends import tuning
from ..kernels import bounded, logprobs, mixing, rows, terms, tiles, topk

V = 151_936  # Qwen3's vocabulary
TARGET_MS = {("KL, trained head", "sm_90"): 60.6}  # the best published rewrite of the same operation, at PATH_SHAPE
PATH_SHAPE = dict(N=8192, H=4096, V=128_256)  # the shape of the published H100 figures
BYTES = {"*fp32": 4, "*bf16": 2}

TYPES = {
    **dict.fromkeys(("MASK",), "*i1"),
    **dict.fromkeys(("PARTS", "SUMS", "STATS_OUT", "WEIGHT", "OUT"), "*fp32"),
    **dict.fromkeys(("BIAS_S", "BIAS_T", "BIAS"), "*bf16"),
    **dict.fromkeys(("stride_s", "stride_o", "stride_g", "V"), "i32"),
    **dict.fromkeys(("inv_t_s", "inv_t_t", "inv_t", "softcap", "entry_clip", "token_clip"), "fp32"),
    **dict.fromkeys(("slope", "grad_scale"), "fp32"),
    **dict.fromkeys(("A", "W"), "*bf16"),
    **dict.fromkeys(("ROWS", "COUNT"), "*i32"),
    **dict.fromkeys(("LENGTHS", "EXPOSED"), "*i64"),
    "MEAN": "*fp32",
    **dict.fromkeys(("P", "MIX", "SHIFT"), "*fp32"),
    "stride_p": "i32",
    "T": "i32",
    **dict.fromkeys(("stride_a", "stride_w", "H"), "i32"),
    **dict.fromkeys(("TARGETS", "IDS"), "*i64"),
    **dict.fromkeys(("LISTED", "GRAD_LISTED"), "*fp32"),
    "K": "i32",
}
FLAGS = dict(IS_DELTA=1, STATS=False, SPLITS=1, BETA=0.5, DERIVATIVE_SUM=None, PRECISION="ieee")
# None unless a case names them in `used`; mask, weights and targets are always present
OPTIONAL = ("BIAS_S", "BIAS_T", "BIAS", "SHIFT", "softcap", "entry_clip", "token_clip")
BIAS_AND_SOFTCAP = ("BIAS_S", "BIAS_T", "softcap")
CLIPS = ("entry_clip", "token_clip")


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    flops_per_logit: float = 0.0
    pointers: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    is_matmul: bool = False
    is_sweep: bool = True  # loops over the vocabulary: the report checks its loads
    # loads of one element, a row's target; the compiler may place them between a loop's addresses
    row_loads: int = 0
    multiples_of_16: tuple[str, ...] = (
        "stride_s", "stride_o", "stride_p", "stride_g", "stride_a", "stride_w", "V", "H",
    )  # fmt: skip

    @property
    def types(self) -> dict[str, str]:
        types = {**TYPES, **self.pointers}
        return {name: types[name] for name in self.kernel.arg_names if name in types and name not in self._absent}

    @property
    def _absent(self) -> list[str]:
        return [name for name in OPTIONAL if name not in self.used]

    def uses_tma(self, arch: str) -> bool:
        return self.is_matmul and self.tile(arch).tma

    def signature(self, arch: str) -> dict[str, str]:
        """Returns the argument types of a launch. With TMA, the head is a descriptor without a stride."""
        types = self.types
        if self.uses_tma(arch):
            tile = self.tile(arch)
            types = {**types, "W": f"tensordesc<bf16[{tile.block_n},{tile.block_k}]>"}
            del types["stride_w"]
        return {name: types.get(name, "constexpr") for name in self.kernel.arg_names}

    def constants(self, arch: str) -> dict[str, Any]:
        tile = {k: v for k, v in self.tile(arch).constants.items() if k.isupper()}
        absent = [*self._absent, *(["stride_w"] if self.uses_tma(arch) else ())]
        constants = {**dict.fromkeys(absent), **FLAGS, "BLOCK": tuning.ROWS[arch].block, **tile, **self.flags}
        return {name: value for name, value in constants.items() if name in self.kernel.arg_names}

    def tile(self, arch: str) -> tuning.TileConfig:
        return tuning.TILES[arch]

    def num_warps(self, arch: str) -> int:
        return self.tile(arch).num_warps if self.is_matmul else tuning.ROWS[arch].num_warps

    def num_stages(self, arch: str) -> int:
        return self.tile(arch).num_stages if self.is_matmul else tuning.ROWS[arch].num_stages

    @property
    def bytes_per_logit(self) -> int:
        """Bytes a row kernel reads of S and of D or T, and writes of the gradient. A tile's operands come from L2."""
        writes = self.flags.get("GRAD") or self.flags.get("PHASE") in ("both", "grad")
        return sum(BYTES[self.types[name]] for name in ("S", "O", *(["G"] if writes else [])) if name in self.types)

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
    both = dict(PHASE="both", TERM=terms.forward_kl, BOUNDED_TERM=bounded.forward_kl, DERIVATIVE_SUM="zero")
    mixed, capped = {**delta, "O": "*fp32"}, {**both, "IS_DELTA": rows.CAPPED_DELTA.value}
    cases = [
        Case("normalise, shared head", rows.normalise, 0, delta),
        Case("normalise, shared head, stats", rows.normalise, 0, delta, stats, row_loads=2),  # S and D at the target
        Case("normalise, bf16 logits", rows.normalise, 0, low),
        Case("normalise, separate heads", rows.normalise, 0, separate, dict(IS_DELTA=0)),
        Case("KL and gradient, shared head", rows.accumulate, 0, delta, both),
        Case("KL and gradient, shared head, stats", rows.accumulate, 0, delta, {**both, **stats}),
        Case("KL and gradient, bf16 logits", rows.accumulate, 0, low, both),
        Case("KL and gradient, separate heads", rows.accumulate, 0, separate, {**both, "IS_DELTA": 0}),
        Case("KL and gradient, bias and softcap", rows.accumulate, 0, delta, both, BIAS_AND_SOFTCAP),
        Case("KL and gradient, views, bias and softcap", rows.accumulate, 0, mixed, capped, BIAS_AND_SOFTCAP),
        Case("a view, bias and softcap", mixing.add_view, 0, {**mixed, "BIAS_S": "*fp32"}, dict(FIRST=False),
             ("BIAS_S", "SHIFT", "softcap"), is_sweep=False),
    ]  # fmt: skip
    for name in ("forward_kl", "reverse_kl", "jsd", "jeffreys", "skew_kl", "skew_reverse_kl", "total_variation"):
        term = dict(TERM=getattr(terms, name), BOUNDED_TERM=getattr(bounded, name))
        sums, grad = ({**term, "PHASE": phase} for phase in ("sum", "grad"))
        cases.append(Case(f"{name}, both clips, sums", rows.accumulate, 0, delta, sums, CLIPS))
        cases.append(Case(f"{name}, both clips, gradient", rows.accumulate, 0, delta, grad, CLIPS))
    for phase, title in (("sum", "sums"), ("grad", "gradient")):
        alpha, jsd = (
            dict(TERM=getattr(terms, name), BOUNDED_TERM=getattr(bounded, name), PHASE=phase)
            for name in ("alpha_divergence", "jsd")
        )
        cases.append(Case(f"alpha, {title}", rows.accumulate, 0, delta, alpha))
        cases.append(Case(f"jsd, {title}, bf16 logits", rows.accumulate, 0, low, jsd))
    # with group= a row has the programs of all ranks; one program a rank if the rows fill the GPU
    ranks = dict(SPLITS=8)
    clipped = dict(PHASE="grad", TERM=terms.jsd, BOUNDED_TERM=bounded.jsd, **ranks)
    cases.append(Case("KL and gradient, eight shards", rows.accumulate, 0, delta, {**both, **ranks}))
    cases.append(Case("jsd, both clips, gradient, eight shards", rows.accumulate, 0, delta, clipped, CLIPS))
    cases.append(Case("a row's statistics, eight shards", rows.finish_stats, flags=ranks, is_sweep=False))
    one = {"S": "*fp32", "G": "*bf16"}
    cases.append(Case("log-prob normaliser", logprobs.normalise_one, 0, one, stats))
    cases.append(Case("log-prob and gradient", logprobs.finish_logprob, 0, one, dict(GRAD=True)))
    cases.append(Case("log-prob and gradient, eight shards", logprobs.finish_logprob, 0, one, dict(GRAD=True, **ranks)))
    cases.append(Case("a row's statistics", rows.finish_stats, flags=dict(SPLITS=4), is_sweep=False))
    cases.append(Case("means over spans", logprobs.span_mean, is_sweep=False))
    cases.append(Case("a teacher's entries taken out", topk.take_listed, pointers=one, is_sweep=False))
    cases.append(Case("their gradient put back", topk.put_listed, pointers=one, is_sweep=False))
    return cases


def _tile_cases() -> list[Case]:
    """Returns the tile kernel's cases. The product takes 2 H FLOPs per logit."""
    return [
        Case(f"tiles: log-prob, H={hidden}", tiles.tile_scores, 2 * hidden, is_matmul=True) for hidden in (2048, 4096)
    ]


CASES = _row_cases() + _tile_cases()

# path, GEMMs in units of U = 2 N H V, a call's row kernels by case name, and their limit in bytes per logit pair
KL = ("normalise, shared head", "KL and gradient, shared head")
KL_BF16 = ("normalise, bf16 logits", "KL and gradient, bf16 logits")
CLIPPED = ("normalise, shared head", "jsd, both clips, sums", "jsd, both clips, gradient")
CLIPPED_BF16 = ("normalise, bf16 logits", "jsd, sums, bf16 logits", "jsd, gradient, bf16 logits")
PATHS = (
    ("KL, frozen head", 3, KL, 14),
    ("KL, trained head", 4, KL, 14),
    ("other or clipped, frozen head", 3, CLIPPED, 20),
    ("other or clipped, trained head", 4, CLIPPED, 20),
    ("KL, trained head, logits_dtype=bf16", 4, KL_BF16, 10),
    ("other or clipped, trained head, logits_dtype=bf16", 4, CLIPPED_BF16, 14),
    ("KL, separate heads, trained", 4, ("normalise, separate heads", "KL and gradient, separate heads"), None),
)


def path_table(gpus, out, faults: list[str]) -> None:
    """Prints the parts of a call's time, at peak rates and at 70 % of the tensor cores' (which good GEMMs reach)."""
    N, H, V = (PATH_SHAPE[k] for k in "NHV")
    by_name = {case.name: case for case in CASES}
    out(f"Roofline of backend triton at N={N:,}, H={H:,}, V={V:,} (computed; python -m bench.gpu measures)")
    columns = ("path", "GPU", "GEMMs (U)", "B/logit pair, limit", "GEMMs ms (at 70 %)", "row kernels ms", "rest ms")
    out(f"| {' | '.join(columns)} | total ms at 70 % | limit ms |")
    out("|---" * 9 + "|")
    for name, units, kernels, limit in PATHS:
        traffic = sum(by_name[kernel].bytes_per_logit for kernel in kernels)
        for gpu in gpus:
            gemm = units * 2 * N * H * V / gpu.tflops / 1e9
            row = traffic * N * V / gpu.terabytes / 1e9
            # dW is zeroed, read and written by the GEMM of each chunk of 4,096 rows, and cast once. With a shared head,
            # torch writes each row's offset into D first, and the GEMM reads it.
            head = (4 + 8 * -(-N // 4096) + 6) * H * V if units == 4 else 0
            rest = (head + ("separate" not in name) * 4 * N * V) / gpu.terabytes / 1e9
            out(
                f"| {name} | {gpu.name} | {units} | {traffic}, {limit or '-'} | {gemm:.1f} ({gemm / 0.7:.1f}) "
                f"| {row:.1f} | {rest:.1f} | {gemm / 0.7 + row + rest:.1f} | {TARGET_MS.get((name, gpu.arch), '-')} |"
            )
            if gemm / 0.7 + row + rest > TARGET_MS.get((name, gpu.arch), float("inf")):
                faults.append(f"{name} on {gpu.name}: the roofline is above {TARGET_MS[name, gpu.arch]} ms")
        if limit is not None and traffic > limit:
            faults.append(f"{name}: {traffic} bytes per logit pair, the limit is {limit}")
