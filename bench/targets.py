"""What the project set itself to show on a CPU, and what the committed results say: reached or not.

The figure in each row is the worst one the results hold, with where it was found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from bench import accuracy_vs_kl, step_vs_trl
from bench.entrants import DENSE, DTYPES, OURS
from bench.loss_speed import PHASES
from bench.machine import load, markdown, names_of, processor_kind
from bench.timing import MM_GEMMS, OWN_GEMMS

Figure = tuple[float, str]  # and where
BOTH = PHASES[0]


def own(name: str) -> bool:
    return name.startswith(OURS) or name in (OWN_GEMMS, MM_GEMMS)


def loss_results(dtype: str, kind: str) -> list[tuple[str, dict[str, float]]]:
    """Losses measured on this kind of processor: what was measured, and the median of each entrant."""
    return [
        (
            f"{r['loss']}, N = {r['tokens']:,}",
            {row["entrant"]: row["median"] for row in r["rows"] if row["phase"] == BOTH},
        )
        for r in map(load, names_of(f"losses/*-{dtype}-*"))
        if processor_kind(r["machine"]) == kind
    ]


def least_speed_up(dtype: str, kind: str) -> Figure | None:
    """The fastest peer's time over ours, forward + backward, in the loss where that is least."""
    results = loss_results(dtype, kind)
    return min(
        ((times[n] / times[OURS], f"{n}, {what}") for what, times in results for n in times if not own(n)), default=None
    )


def largest_excess(dtype: str, kind: str, logprobs: bool) -> Figure | None:
    """Our time over that of our own products, forward + backward, in the loss where that is most."""
    results = [(what, t) for what, t in loss_results(dtype, kind) if what.startswith("logprobs") == logprobs]
    return max(((t[OURS] / t[OWN_GEMMS], what) for what, t in results if OWN_GEMMS in t), default=None)


def largest_memory_share() -> Figure | None:
    """Our extra memory over dense torch's at the same number of tokens, at the most tokens there are both for."""
    if not names_of("memory"):
        return None
    measured = [r for r in load("memory")["rows"] if "extra_bytes" in r]
    sizes = {(r["entrant"], r["dtype"], r["tokens"]): r["extra_bytes"] for r in measured}
    figures = []
    for dtype in DTYPES:
        both = [n for (name, d, n) in sizes if (name, d) == (DENSE, dtype) and (OURS, dtype, n) in sizes]
        if both:
            n = max(both)
            figures.append((sizes[OURS, dtype, n] / sizes[DENSE, dtype, n], f"{dtype}, N = {n:,}"))
    return max(figures, default=None)


def least_accuracy_gain() -> Figure | None:
    """The most accurate bf16 peer's gradient error over ours, at the mean KL nearest to 0.01."""
    if not names_of("accuracy_vs_kl"):
        return None
    result = load("accuracy_vs_kl")
    row = min(result["rows"], key=lambda row: abs(row["mean_kl_bf16"] - 0.01))
    errors = {n: row[f"{n} bf16"]["gradient"] for n in result["compared"] if f"{n} bf16" in row}
    peers = [(errors[n] / errors[OURS], n) for n in errors if n not in (OURS, accuracy_vs_kl.SEPARATE)]
    return min(peers, default=None)


def least_rollout_gain() -> Figure | None:
    """vLLM's tokens per second over those of transformers' own `generate`, for the sampling where that is least."""
    if not names_of("rollout_speed"):
        return None
    result = load("rollout_speed")
    figures = [
        (statistics.median(by_engine["generate"]) / statistics.median(by_engine["vllm"]), f"{label}, {result['dtype']}")
        for label, by_engine in result["seconds"].items()
    ]
    return min(figures, default=None)


def largest_sync_share() -> Figure | None:
    if not names_of("weight_sync"):
        return None
    result = load("weight_sync")
    shares = [(s["seconds_weight_sync"] / s["seconds_step"], trained) for trained, s in result["steps"].items()]
    return max(shares, default=None)


def step_ratio(dtype: str, what: str) -> Figure | None:
    """In one setting of each side."""
    if not names_of(f"step_vs_trl-{dtype}"):
        return None
    found = step_vs_trl.one_setting(load(f"step_vs_trl-{dtype}"), step_vs_trl.LIMITS[dtype])
    return (found[2][what], f"{found[0]}; {found[1]}") if found else None


def best_step_ratio(dtype: str, what: str) -> Figure | None:
    """Our best setting for `what` over TRL's."""
    if not names_of(f"step_vs_trl-{dtype}"):
        return None
    found = step_vs_trl.ratios(load(f"step_vs_trl-{dtype}"))
    return (found[what], "each side's best setting for it") if what in found else None


# what, the limit as it is said, the figure, whether the figure is within the limit
Target = tuple[str, str, Callable[[], Figure | None], Callable[[float], bool]]
TARGETS: list[Target] = [
    ("extra memory, of dense torch's", "at most 0.1", largest_memory_share, (0.1).__ge__),
    ("bf16 gradient error at mean KL 0.01", "10x smaller than any peer's", least_accuracy_gain, (10.0).__le__),
    *(
        (f"{label} of a step, of TRL's, {d}", f"at most {limit}", partial(ratio, d, what), limit.__ge__)
        for d in ("fp32", "bf16")
        for ratio in (step_ratio, best_step_ratio)
        for (what, limit), label in zip(step_vs_trl.LIMITS[d].items(), ("time", "memory"), strict=True)
    ),
    ("vLLM's rollouts, tokens/s of HF `generate`'s", "at least 1.5x", least_rollout_gain, (1.5).__le__),
    ("weight sync to vLLM, of a step", "under 0.1", largest_sync_share, (0.1).__gt__),
]


def of_losses() -> list[Target]:
    """Targets of each kind of processor that has results."""
    kinds = {(r["dtype"], processor_kind(r["machine"])) for r in map(load, names_of("losses/*"))}
    found: list[Target] = []
    for dtype, kind in sorted(kinds, key=lambda pair: (pair[1], pair[0])):
        where, excess = f"{dtype}, {kind}", partial(largest_excess, dtype, kind)
        found += [
            (
                f"losses, the fastest peer's time over ours, {where}",
                "over 1",
                partial(least_speed_up, dtype, kind),
                (1.0).__lt__,
            ),
            (
                f"divergences, time over that of our products, {where}",
                "at most 1.25",
                partial(excess, False),
                (1.25).__ge__,
            ),
            (
                f"log-probs, time over that of our products, {where}",
                "at most 1.15",
                partial(excess, True),
                (1.15).__ge__,
            ),
        ]
    return [target for target in found if target[2]() is not None]


def table() -> str:
    rows = []
    for what, limit, figure, within in [*of_losses(), *TARGETS]:
        found = figure()
        if found is None:
            rows.append([what, limit, "not measured", "", ""])
        else:
            value, where = found
            rows.append([what, limit, f"{value:.3g}", where, "yes" if within(value) else "**no**"])
    return markdown(["target", "limit", "worst measured", "where", "reached"], rows) + "\n"
