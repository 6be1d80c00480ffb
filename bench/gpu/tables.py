"""bench/results/gpu/*.json -> tables, with the card's name on every row. `python -m bench.gpu` makes them.

Separate from report.py, which prints all of one run: here stands what a reader of the README looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import machine, timing
from bench.entrants import DENSE, OURS, TRL_CHUNKED
from bench.gpu import correct, headline, rollouts, step_table, training
from bench.gpu.step_variants import CHUNKED as CHUNKED_STEP
from bench.gpu.step_variants import OURS as OUR_STEP
from bench.machine import markdown

NOT_MEASURED = "not yet measured on a GPU"
HEADS = ("frozen", "trained")
SWEEPS = ("normalise", "accumulate", "normalise_one", "finish_logprob")
# bytes a logit pair of the profiled losses; log-probabilities read S twice and write its gradient
PROFILED = {"forward_kl": 14, "jsd": 20, "entry_clip": 20, "logprobs": 10}
FRONT = ("flash-linear-attention", OURS, "ORDA", DENSE, TRL_CHUNKED, "Liger fused JSD")
# of bf16: what rounds both models' logits loses the direction of a small gradient
EXACT = 0.005


def results() -> list[dict]:
    """One for each card, complete or not."""
    return [machine.load(name) for name in machine.names_of("gpu/*")]


def card(result: dict) -> str:
    return result["stages"]["card"]["card"]["name"]


def heads(result: dict) -> Iterator[tuple[str, dict]]:
    """The heads that were measured, with the rows of the run that had most entrants."""
    found = result["stages"].get("headline", {})
    for head in HEADS:
        if rows := found.get(f"{head}, with peers") or found.get(head):
            yield head, rows


def head_rows() -> str:
    """Forward KL at the published shape, every entrant."""
    cells = []
    for result in results():
        shape, tokens = (result["stages"].get("headline", {}).get(key) for key in ("shape", "tokens"))
        for head, found in heads(result):
            units, rows = (3 if head == "frozen" else 4), found["rows"]
            own = rows[OURS]["median"]
            flops = units * 2 * tokens * shape["hidden"] * shape["vocab"]
            for name, row in headline.measured(rows):
                extra = f"{row['extra_bytes'] / 2**30:.1f}" if "extra_bytes" in row else ""
                cells.append([
                    f"{name}, {head} head", card(result), timing.with_spread(row),
                    str(len(row["rounds"])), f"{flops / row['median'] / 1e12:.0f}",
                    f"{row['median'] / own:.2f}x", extra, machine.percent(row.get("gradient_error")),
                ])  # fmt: skip
            cells += [
                [f"{name}, {head} head", card(result), why[:80], *[""] * 5] for name, why in found["failed"].items()
            ]
    header = ["forward + backward, bf16", "GPU", "median (range)", "rounds", "TFLOP/s", "of ours", "extra GiB"]
    header.append("error of the hidden states' gradient")
    return markdown(header, cells)


def front_rows() -> str:
    """Six rows for the front page: a frozen head; the fastest entrant, and those people know by name."""
    cells = []
    for result in results():
        found = dict(heads(result)).get("frozen")
        if not found:
            continue
        rows = found["rows"]
        own = rows[OURS]["median"]
        for name in sorted((name for name in FRONT if "median" in rows.get(name, {})), key=lambda n: rows[n]["median"]):
            row = rows[name]
            extra, error = f"{row['extra_bytes'] / 2**30:.1f} GiB", machine.percent(row["gradient_error"])
            cells.append([name, timing.duration(row["median"]), f"{row['median'] / own:.2f}x", extra, error])
    return markdown(["", "time", "of ours", "extra memory", "error of the gradient"], cells)


def divergences() -> Iterator[tuple[str, str, str, float, float]]:
    """Card, head, divergence, seconds, and the seconds that its products and bytes allow."""
    for result in results():
        found = result["stages"].get("headline", {})
        copy = result["stages"]["card"]["copy_bytes_per_second"]
        for head in HEADS:
            for name, row in found.get(f"divergences, {head}", {}).items():
                if name != headline.PRODUCTS:
                    yield card(result), head, name, row["seconds"], headline.allowed_seconds(found, head, name, copy)


def divergence_rows() -> str:
    """Each divergence beside what its products and its bytes allow."""
    cells = [
        [f"{name}, {head} head", gpu, f"{1e3 * seconds:.1f} ms", f"{1e3 * allowed:.1f} ms", f"{seconds / allowed:.2f}"]
        for gpu, head, name, seconds, allowed in divergences()
    ]
    limit = "1.03 x (products + bytes at 85 % of a copy's rate)"
    return markdown(["divergence", "GPU", "time", limit, "of that"], cells)


def shape_rows() -> str:
    """Losses at the shapes of real models."""
    cells = []
    for result in results():
        for part in result["stages"].get("model_shapes", {}).get("parts", {}).values():
            where = f"{part['loss']}, {part['shape']['name']}, N {part['tokens']:,}"
            own = part["rows"].get(OURS, {}).get("median")
            times = [
                f"{name} {1e3 * row['median']:.1f} ms" + (" (once)" if len(row["rounds"]) == 1 else "")
                for name, row in sorted(part["rows"].items(), key=lambda item: item[1]["median"])
                if name != OURS
            ]
            if own:
                cells.append([where, card(result), f"{1e3 * own:.1f} ms", "; ".join(times)])
    return markdown(["forward + backward, bf16, frozen head", "GPU", OURS, "others"], cells)


def top_k_rows() -> str:
    """Losses of a teacher that is known by its top K."""
    cells = []
    for result in results():
        found = result["stages"].get("model_shapes", {}).get("top_k")
        for row in found["rows"] if found else ():
            where = f"{found['shape']['name']}, N {found['tokens']:,}, K {found['k']}"
            error = machine.percent(row["error"])
            cells.append([f"{row['entrant']}, tail {row['tail']}", card(result), where, timing.with_spread(row), error])
    return markdown(["loss, bf16", "GPU", "shape", "forward + backward", "error of the gradient"], cells)


def rollout_rows() -> str:
    """Tokens a second of 32 responses, the first time at their lengths and again."""
    cells = []
    for result in results():
        for name, row in result["stages"].get("rollouts", {}).get("rows", {}).items():
            again = f"{row['tokens_per_second']:,.0f}" if len(row["rounds"]) > 1 else ""
            cells.append([
                name, card(result), f"{row['first_tokens_per_second']:,.0f}", again,
                f"{1e3 * row['min'] / row['new_tokens']:.1f} ms", f"{row['extra_bytes'] / 2**30:.1f}",
            ])  # fmt: skip
    header = ["32 responses of 128 tokens", "GPU", "tokens/s, first", "tokens/s, again", "a decoding step", "extra GiB"]
    return markdown(header, cells)


def training_rows() -> str:
    """A run from start to end, and one that was killed and resumed."""
    cells = []
    for result in results():
        found = result["stages"].get("training", {})
        if learned := found.get("learned"):
            cells += [[what, card(result), outcome] for what, outcome in training.learned_cells(learned)]
        if resumed := found.get("resumed"):
            cells.append(["killed in the middle and resumed", card(result), training.resumption(resumed)])
    return markdown(["run in the lab, bf16 autocast", "GPU", "outcome"], cells)


def prediction_rows() -> str:
    """What the plans said of the step, beside what was measured."""
    cells = []
    for result in results():
        step = result["stages"].get("step", {})
        for row in step.get("rows", {}).values():
            if row["variant"] == OUR_STEP and not row["spread"]:
                cells += [[name, card(result), *rest] for name, *rest in step_table.prediction_cells(row, step)]
        decoded = result["stages"].get("rollouts", {})
        for name, row in decoded.get("rows", {}).items():
            if name.startswith(rollouts.ENGINE):
                seconds = decoded["predicted"] / decoded["sizes"]["new_tokens"], row["min"] / row["new_tokens"]
                cells.append([
                    f"{name}: a decoding step", card(result), *(f"{1e3 * s:.1f} ms" for s in seconds),
                    f"{seconds[1] / seconds[0]:.0f}",
                ])  # fmt: skip
    return markdown(["", "GPU", "predicted", "measured", "measured / predicted"], cells)


def step_rows() -> str:
    """A training step beside TRL's."""
    cells = [
        [f"{row['variant']}; {row['setting']}, {row['workload']}", gpu, *step_table.step_cells(row, own)[1:]]
        for gpu, row, own in steps()
    ]
    return markdown(["step", "GPU", *step_table.COLUMNS], cells)


def steps() -> Iterator[tuple[str, dict, dict | None]]:
    """Card, a step's row, and our row in the same setting and workload."""
    for result in results():
        rows = list(result["stages"].get("step", {}).get("rows", {}).values())
        ours = {(row["setting"], row["workload"]): row for row in rows if row["variant"] == OUR_STEP}
        for row in rows:
            yield card(result), row, ours.get((row["setting"], row["workload"]))


def correct_rows() -> str:
    """What ran on the GPU, and what came of it."""
    cells = []
    for result in results():
        found = result["stages"].get("correct", {})
        for name, tests in found.get("tests", {}).items():
            cells.append([f"tests, {name}", card(result), correct.outcome(tests)])
        for name, check in found.get("checks", {}).items():
            verdict = {True: "passed", False: "failed", None: "not run"}[check["passed"]]
            cells.append([name.replace("_", " "), card(result), verdict])
        if "sanitizer" in found:
            outcome = "no fault" if found["sanitizer"]["passed"] else "faults"
            cells.append(["compute-sanitizer", card(result), outcome])
    return markdown(["check", "GPU", "outcome"], cells)


Figure = tuple[float, str]


def gradient_errors() -> Iterator[Figure]:
    for result in results():
        for head, found in heads(result):
            if "gradient_error" in found["rows"].get(OURS, {}):
                yield 100 * found["rows"][OURS]["gradient_error"], f"{card(result)}, {head} head"


def row_rates() -> Iterator[Figure]:
    """Bytes a second of the sweeps over a copy's, by the profiler."""
    for result in results():
        found = result["stages"].get("kernels", {})
        for name, width in PROFILED.items():
            kernels = found.get("profiles", {}).get(name, {})
            seconds = sum(row["ms"] for kernel, row in kernels.items() if kernel in SWEEPS) / 1e3
            if seconds:
                moved = width * found["tokens"] * found["shape"]["vocab"]
                yield moved / seconds / result["stages"]["card"]["copy_bytes_per_second"], f"{card(result)}, {name}"


def over_allowed() -> Iterator[Figure]:
    """Times over `headline.allowed_seconds`."""
    for gpu, head, name, seconds, allowed in divergences():
        yield seconds / allowed, f"{gpu}, {name}, {head} head"


def peers(exact: bool) -> Iterator[Figure]:
    """A peer's time over ours; with `exact`, of those whose gradient is as exact as ours is meant to be."""
    for result in results():
        for head, found in heads(result):
            own = found["rows"][OURS]["median"]
            for name, row in found["rows"].items():
                is_peer = "median" in row and not name.startswith(OURS) and name != headline.PRODUCTS
                if is_peer and (not exact or row.get("gradient_error", 1) < EXACT):
                    yield row["median"] / own, f"{card(result)}, {name}, {head} head"


def extra_memory() -> Iterator[Figure]:
    for result in results():
        for head, found in heads(result):
            if "extra_bytes" in found["rows"][OURS]:
                yield found["rows"][OURS]["extra_bytes"] / 2**30, f"{card(result)}, {head} head"


def step_gains() -> Iterator[Figure]:
    """Our tokens a second over those of TRL's chunked loss, in the same setting."""
    for gpu, row, own in steps():
        if own and row["variant"] == CHUNKED_STEP:
            gain = own["tokens_per_second"] / row["tokens_per_second"]
            yield gain, f"{gpu}, {own['setting']}, {own['workload']}"


# what, the limit as it is said, the figures, which of them is the worst, whether that is within the limit
TARGETS: list[tuple[str, str, Callable[[], Iterator[Figure]], Callable, Callable[[float], bool]]] = [
    ("bf16 error of the hidden states' gradient, %", "at most 0.5", gradient_errors, max, (0.5).__ge__),
    ("time of a divergence over what its products and bytes allow", "at most 1", over_allowed, max, (1.0).__ge__),
    ("rate of the row kernels, of a copy's", "at least 0.85", row_rates, min, (0.85).__le__),
    ("fastest peer as exact, over ours", "at least 1.15", lambda: peers(exact=True), min, (1.15).__le__),
    ("fastest peer of any error, over ours", "at least 1.15", lambda: peers(exact=False), min, (1.15).__le__),
    ("extra memory, GiB", "at most 1.5", extra_memory, max, (1.5).__ge__),
    ("step, tokens/s over TRL's chunked loss", "at least 1.5", step_gains, min, (1.5).__le__),
]


def target_rows() -> str:
    cells = []
    for what, limit, figures, worst, within in TARGETS:
        found = list(figures())
        if not found:
            cells.append([what, limit, NOT_MEASURED, "", ""])
            continue
        value, where = worst(found)
        cells.append([what, limit, f"{value:.3g}", where, "yes" if within(value) else "**no**"])
    return markdown(["target", "limit", "worst measured", "where", "reached"], cells)


def commits(result: dict, stages: tuple[str, ...]) -> str:
    """A card's stages, and parts of them, may come from runs of several commits."""
    found: dict[str, list[str]] = {}
    for name in stages:
        stage = result["stages"].get(name, {})
        if "commit" in stage:
            found.setdefault(stage["commit"], []).append(name.replace("_", " "))
        for part, tests in stage.get("tests", {}).items():
            if "commit" in tests:
                found.setdefault(tests["commit"], []).append(part)
    if len(found) == 1:
        return f"commit {next(iter(found))}"
    return "; ".join(f"commit {commit} ({', '.join(parts)})" for commit, parts in found.items())


def sources(stages: tuple[str, ...]) -> str:
    lines = []
    for result in results():
        found = result["stages"]["card"]
        software = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        c = found["card"]
        lines.append(
            f"\n<sub>{c['name']}, {c['memory_gib']} GiB, driver {c['driver']}, CUDA {c['cuda']}: copies "
            f"{found['copy_bytes_per_second'] / 1e12:.2f} TB/s, an {found['product_cube']}-cube bf16 product "
            f"{found['product_flops_per_second'] / 1e12:.0f} TFLOP/s; {software}; {commits(result, stages)}</sub>"
        )
    return "".join(lines)


def of(rows: Callable[[], str], *stages: str) -> Callable[[], str]:
    """A table of `bench.table`: its rows with their source, or one line where there is no result."""
    return lambda: f"{rows()}\n{sources(stages)}" if results() else f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}.\n"


TABLES = {
    "front": of(front_rows, "headline"),
    "gpu_correct": of(correct_rows, "correct"),
    "gpu_losses": of(head_rows, "headline"),
    "gpu_divergences": of(divergence_rows, "headline"),
    "gpu_shapes": of(shape_rows, "model_shapes"),
    "gpu_top_k": of(top_k_rows, "model_shapes"),
    "gpu_step": of(step_rows, "step"),
    "gpu_predictions": of(prediction_rows, "step", "rollouts"),
    "gpu_rollouts": of(rollout_rows, "rollouts"),
    "gpu_training": of(training_rows, "training"),
    "gpu_targets": of(target_rows, "headline", "kernels", "step"),
}
