"""The tables of stage 6, from what it has kept. Separate from step.py, so that a table can be drawn without a model."""

from __future__ import annotations

from atesd.planning.memory_plan import GIB
from bench.gpu.step_variants import OURS
from bench.machine import markdown

PHASES = ("layout", "teacher", "student", "loss", "backward")
COLUMNS = ("ms", "fastest", "host", "response tokens/s", "of ours", "peak GiB", "micro-batch", *PHASES)


def table(result: dict) -> str:
    sizes = result["sizes"]
    lines = [
        f"Qwen3-1.7B's sizes, LoRA r 64, bf16: {sizes['problems']} problems, prompts of {sizes['student_prompt']} "
        f"tokens (student) and {sizes['teacher_prompt']} (teacher). Without rollouts and optimizer. TRL's backward "
        'includes that of the loss and of the head. "host" is the time to the last launch, waits for the GPU included; '
        "other times are the GPU's. Times are medians in ms.",
    ]
    if result.get("packing", "kept apart") != "kept apart":
        lines += ["", f"Packed sequences: {result['packing']}"]
    rows = list(result["rows"].values())
    for setting, workload in dict.fromkeys((row["setting"], row["workload"]) for row in rows):
        group = [row for row in rows if (row["setting"], row["workload"]) == (setting, workload)]
        own = next((row for row in group if row["variant"] == OURS), None)
        cells = [step_cells(row, own) for row in group]
        title = f"{setting}, {workload}"
        lines += ["", markdown([title, *COLUMNS], cells)]
    if result["failed"]:
        lines += ["", *(f"- {key}: {why}" for key, why in result["failed"].items())]
    cells = [c for row in rows if row["variant"] == OURS and not row["spread"] for c in prediction_cells(row, result)]
    if cells:
        lines += [
            "",
            "The plans beside this library's steps; seconds are by `atesd scaling`'s formulas for this GPU:",
            "",
        ]
        lines.append(markdown(["", "predicted", "measured", "measured / predicted"], cells))
    return "\n".join(lines)


def step_cells(row: dict, own: dict | None) -> list[str]:
    phases = row["phases"]
    return [
        row["variant"],
        *(f"{1e3 * row[name]:.0f}" for name in ("seconds", "fastest", "host_seconds")),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds'] / own['seconds']:.2f}x" if own else "",
        f"{row['peak'] / GIB:.1f}",
        str(row["micro_batch"]),
        *(f"{1e3 * phases[name]:.0f}" for name in PHASES),
    ]


def prediction_cells(row: dict, result: dict) -> list[list[str]]:
    """What the plan says of this row's layers and micro-batch, beside what was measured."""
    plan = result["predicted"].get(f"{row['micro_batch']}, {row['setting']}")
    if plan is None:
        return []
    memory, phases, name = plan["memory"], row["phases"], f"{row['setting']}, micro-batch {row['micro_batch']}"
    kept, planned = row["bytes"]["student"]["kept"], memory["activations"] + memory["autocast_copies"]
    pairs = [
        ("weights", memory["weights"] / GIB, result.get("weights", 0) / GIB, "GiB"),
        ("kept by the student's forward", planned / GIB, kept / GIB, "GiB"),
        (
            "loss, with its hidden states",
            (memory["loss_chunk"] + memory["hidden_states"]) / GIB,
            row["bytes"]["loss"]["extra"] / GIB,
            "GiB",
        ),
        ("peak", plan["peak"] / GIB, row["peak"] / GIB, "GiB"),
        ("peak, as --dry-run plans", plan["dry_run_peak"] / GIB, row["peak"] / GIB, "GiB"),
        ("teacher", plan["seconds"]["teacher"], phases["teacher"], "s"),
        ("student and its backward", plan["seconds"]["student"], phases["student"] + phases["backward"], "s"),
        ("loss and its backward", plan["seconds"]["loss"], phases["loss"], "s"),
    ]
    return [
        [f"{name}: {what}", f"{a:.3g} {unit}", f"{b:.3g} {unit}", f"{b / a:.2f}" if a else ""]
        for what, a, b, unit in pairs
    ]
