"""Stage 8: runs from start to end, as a user starts them: `atesd train` in the lab, under bf16 autocast.

The first run trains under full exposure, with an evaluation before and after: does the student learn what it learns
on a CPU, and how long does a step take? The model is tiny, so a step's time is that of launches. Then a run under the
learned exposure goes through without a break, another is killed in the middle and resumed, and the rows that both have
logged are compared. Attention's backward adds in no fixed order on a GPU: whether rows are equal to the last bit is
reported, not required.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atesd.reports.learned import headline, read_comparison
from atesd.reports.metrics import METRICS, read_jsonl
from atesd.studies.lab.pretrain import make_lab
from bench.gpu.clock import first_line
from bench.gpu.stage import Stage
from bench.machine import ROOT, markdown

MODEL = ROOT / "bench" / "results" / "studies" / "lab-model"
# of the learning run; of the two that are compared, which save every quarter
STEPS, COMPARED = 150, 16
DRY_STEPS, DRY_COMPARED = 2, 4
LEAST_LEFT = 45.0  # seconds without which no second pair of runs begins
WAIT = 0.05  # seconds between two looks into a run's log
COMPARED_METRICS = ("loss", "grad_norm", "alpha", "probe_nll", "response_length")


def run(stage: Stage) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder)
        make_lab(lab / "lab", model=MODEL)
        stage.keep(learned=learn(stage, lab))
        if not stage.dry and stage.left < LEAST_LEFT:
            stage.leave_out("a run that is killed and resumed", "no time was left")
            return
        try:
            stage.keep(resumed=kill_and_resume(stage, lab))
        except Exception as error:  # the first run's numbers stay
            stage.leave_out("a run that is killed and resumed", first_line(error))


def command(stage: Stage, name: str, steps: int, save_steps: int, *more: str) -> list[str]:
    problems = ["--per_device_train_batch_size", "2", "--num_probe_problems", "2", "--num_eval_problems", "2"]
    return [
        *(sys.executable, "-m", "atesd", "train", "lab", "--output_dir", f"runs/{name}", "--bf16", "true"),
        *("--max_steps", str(steps), "--save_steps", str(save_steps), *(problems if stage.dry else []), *more),
    ]


def start(stage: Stage, lab: Path, arguments: list[str], log: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if stage.dry:
        environment["OMP_NUM_THREADS"] = "1"  # two runs at a time, beside other work
    with (lab / log).open("w") as file:
        return subprocess.Popen(arguments, cwd=lab, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(stage: Stage, lab: Path, process: subprocess.Popen, log: str) -> None:
    """Waits as long as the stage may. A run that fails says why in its last lines."""
    status = process.wait(max(1.0, stage.left - 3) if not stage.dry else None)
    if status != 0:
        raise RuntimeError(f"status {status}: {(lab / log).read_text(errors='replace')[-600:]}")


def steps_of(run_dir: Path) -> list[dict]:
    return [row for row in read_jsonl(run_dir / METRICS) if "loss" in row]


def learn(stage: Stage, lab: Path) -> dict:
    steps = DRY_STEPS if stage.dry else STEPS
    flags = ["--exposure_policy", "full", "--learning_rate", "2e-3", "--eval_steps", str(steps)]
    began, run_dir = time.time(), lab / "runs/learns"
    process = start(stage, lab, command(stage, "learns", steps, steps, *flags), "learns.txt")
    while process.poll() is None and not (run_dir / METRICS).exists():
        time.sleep(WAIT)
    to_first_row = time.time() - began
    finish(stage, lab, process, "learns.txt")
    seconds, rows, found = time.time() - began, steps_of(run_dir), read_comparison(run_dir)
    names = [name for name in rows[0] if name.startswith("seconds_")]  # the last row has an evaluation's as well
    phases = {name: statistics.median(row[name] for row in rows) for name in names}
    result = {
        "steps": steps,
        "seconds": seconds,
        "seconds_to_first_row": to_first_row,  # its evaluation before training included
        "seconds_first_step": rows[0]["seconds_step"],
        "seconds_eval": rows[-1]["seconds_eval"],
        "seconds_after_last_row": began + seconds - (run_dir / METRICS).stat().st_mtime,
        "phases": phases,
        "accuracy": {key: found[key] for key in ("num_problems", "before", "after", "change")},
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "report": (run_dir / "report.html").exists(),
    }
    stage.say(f"{headline(found)}; {seconds:.0f} s in all, {phases['seconds_step']:.3f} s a step")
    return result


def kill_and_resume(stage: Stage, lab: Path) -> dict:
    steps = DRY_COMPARED if stage.dry else COMPARED
    save = steps // 4
    whole = start(stage, lab, command(stage, "whole", steps, save), "whole.txt")
    killed = start(stage, lab, command(stage, "killed", steps, save), "killed.txt")
    run_dir = lab / "runs/killed"
    while killed.poll() is None and len(steps_of(run_dir)) < steps // 2 + 1:
        time.sleep(WAIT)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    at_kill = len(steps_of(run_dir))
    resumed = start(stage, lab, [sys.executable, "-m", "atesd", "train", "--resume", "runs/killed"], "resumed.txt")
    finish(stage, lab, resumed, "resumed.txt")
    finish(stage, lab, whole, "whole.txt")
    result = {"steps": steps, "killed_after": at_kill, **difference(steps_of(lab / "runs/whole"), steps_of(run_dir))}
    stage.say(f"killed after step {at_kill} of {steps} and resumed: {result}")
    return result


def difference(one: list[dict], other: list[dict]) -> dict:
    """Where the rows of two runs first differ, and by how much at most, relative to the first run's."""
    if [row["step"] for row in one] != [row["step"] for row in other]:
        return {"equal": False, "first": None, "why": f"{len(one)} rows and {len(other)}"}
    first, largest = None, dict.fromkeys(COMPARED_METRICS, 0.0)
    for a, b in zip(one, other, strict=True):
        for name in COMPARED_METRICS:
            gap = abs(a[name] - b[name]) / max(abs(a[name]), 1e-12)
            largest[name] = max(largest[name], gap)
            first = a["step"] if gap and first is None else first
    return {"equal": first is None, "first": first, "largest": largest}


def table(result: dict) -> str:
    cells = [list(row) for row in learned_cells(result["learned"])]
    if "resumed" in result:
        cells.append(["killed in the middle and resumed", resumption(result["resumed"])])
    return markdown(["run in the lab", "outcome"], cells)


def learned_cells(found: dict) -> list[tuple[str, str]]:
    phases = {name.removeprefix("seconds_"): 1e3 * seconds for name, seconds in found["phases"].items()}
    step = phases.pop("step")
    parts = ", ".join(f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in phases.items() if ms >= 0.5)
    before, after = found["seconds_to_first_row"], found["seconds_after_last_row"]
    whole = f"{found['seconds']:.0f} s, {before:.0f} of them before the first step and {after:.0f} after the last"
    return [
        (f"full exposure, {found['steps']} steps", headline(found["accuracy"])),
        ("a step, ms", f"{step:.0f} ({parts})"),
        ("the whole run", whole),
        ("peak memory", f"{found['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]


def resumption(found: dict) -> str:
    if found["equal"]:
        return f"{found['steps']} steps, each equal to the last bit to those of a run that was not killed"
    if found["first"] is None:
        return f"not comparable, {found['why']}"
    return f"equal up to step {found['first'] - 1} of {found['steps']}, killed after {found['killed_after']}"
