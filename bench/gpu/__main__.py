"""Everything this project claims about a GPU, measured on the one at hand in a few minutes.

    python -m bench.gpu [--minutes 13] [--out DIR] [--stages 1-4]     make gpu is the same
    python -m bench.gpu --dry                                        every stage on the CPU, at toy sizes

Stages run in order of worth, each in a process of its own with its own time limit. Results are saved as they come:
DIR/gpu.json (read by `python -m bench.table` once it lies in bench/results/gpu/), DIR/log.txt and one figure. A stage
that crashes or hangs costs only itself. What does not fit into the minutes is left out, and the last table names it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.gpu.stage import Stage, leave_out, read

# number, module, seconds. The first four take six minutes together, the others seven.
STAGES = {
    1: ("card", 15),
    2: ("correct", 170),
    3: ("headline", 90),
    4: ("kernels", 65),
    5: ("model_shapes", 100),
    6: ("step", 105),
    7: ("rollouts", 75),
    8: ("training", 140),
}
# stage -> the module whose `warm` compiles what it launches. Kernels are the same for every hidden size, and for every
# vocabulary divisible by 16: stage 5 launches stage 3's.
WARMED = {3: "headline", 4: "kernels", 5: "headline", 6: "step"}
LEAST_SECONDS = 10  # a stage that has less is left out
DRY_SECONDS = 240


def numbers(text: str) -> list[int]:
    """The stages that a text such as 1-4 or 3,5-7 names."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        named = range(int(first), int(last or first) + 1)
        if not named:
            raise argparse.ArgumentTypeError(f"{part} names no stage: the smaller number comes first")
        found += named
    unknown = sorted(set(found) - set(STAGES))
    if unknown:
        raise argparse.ArgumentTypeError(f"stages are numbered 1 to {max(STAGES)}, got {unknown[0]}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=13.0, help="for all stages together (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default: %(default)s")
    parser.add_argument("--stages", type=numbers, default=list(STAGES), help="for example 1-4 or 3,5-7 (default: all)")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU: shows that everything runs")
    parser.add_argument("--one", type=int, choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return run_one(options)
    if not options.dry and not has_gpu():
        parser.error("torch finds no GPU here. --dry runs every stage on the CPU, at toy sizes.")
    return run_all(options)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_one(options: argparse.Namespace) -> int:
    name = STAGES[options.one][0]
    faulthandler.dump_traceback_later(max(1.0, options.seconds - 1))  # where a stage stood at its limit, in log.txt
    stage = Stage(name, options.out, options.seconds, options.dry)
    stage.begin()
    importlib.import_module(f"bench.gpu.{name}").run(stage)
    return 0


def run_all(options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = sum(STAGES[number][1] for number in options.stages)
    stretch = max(1.0, 60 * options.minutes / wanted)
    failed = []
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        warming = None
        for number in options.stages:
            name, seconds = STAGES[number]
            seconds = DRY_SECONDS if options.dry else min(seconds * stretch, end - time.monotonic())
            if seconds < LEAST_SECONDS:
                leave_out(options.out, name, "the minutes were used up")
                continue
            if number > 1 and warming is None and not options.dry:
                modules = dict.fromkeys(WARMED[stage] for stage in options.stages if stage in WARMED)
                warming = Warming(log, min(seconds, 90), list(modules))
            if warming is not None and name != "correct":
                warming.wait()
                seconds = min(seconds, end - time.monotonic())
                if seconds < LEAST_SECONDS:
                    leave_out(options.out, name, "compiling used up the minutes")
                    continue
            status = run_stage(number, seconds, options, log)
            if status != "done":
                failed.append(name)
                leave_out(options.out, f"{name} (its later parts)", status)
        print_tables(options.out, log)
    return 1 if failed or not is_right(read(options.out)) else 0


def is_right(result: dict) -> bool:
    """False if a check or a test of stage 2 failed, or if no test ran."""
    found = result.get("stages", {}).get("correct", {})
    checks = all(check["passed"] is not False for check in found.get("checks", {}).values())
    tests = found.get("tests", {}).values()
    return checks and all(group["failed"] == 0 for group in tests) and (not tests or any(g["passed"] for g in tests))


def run_stage(number: int, seconds: float, options: argparse.Namespace, log) -> str:
    """What ended the stage: the word done, or why it ended early."""
    name = STAGES[number][0]
    say(log, f"=== stage {number}, {name}: up to {seconds:.0f} s")
    command = [sys.executable, "-m", "bench.gpu", "--one", str(number), "--seconds", str(seconds)]
    command += ["--out", str(options.out), *(["--dry"] if options.dry else [])]
    process = start(command)
    reader = threading.Thread(target=copy_lines, args=(process, log), daemon=True)
    reader.start()
    try:
        status = process.wait(seconds + 3)  # it knows its seconds, and should end by itself
        reader.join(5)
        return "done" if status == 0 else f"its process ended with status {status}; see log.txt"
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {seconds:.0f} s"
    finally:
        stop(process)


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )


def stop(process: subprocess.Popen) -> None:
    """End a process and those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_lines(process: subprocess.Popen, log) -> None:
    for line in process.stdout:
        say(log, line.rstrip("\n"))


class Warming:
    """Compiles what the stages will launch, in processes of its own on processors that nothing else uses.

    It may run beside the tests. A measurement waits for it: beside a compiler it would not be one.
    """

    def __init__(self, log, seconds: float, modules: list[str]):
        workers = max(1, min(6, (os.cpu_count() or 2) // 3))
        command = [sys.executable, "-m", "bench.gpu.warm"]
        self.deadline = time.monotonic() + seconds
        parts = range(workers if modules else 0)
        self.processes = [start([*command, str(i), str(workers), *modules]) for i in parts]
        for process in self.processes:
            threading.Thread(target=copy_lines, args=(process, log), daemon=True).start()

    def wait(self) -> None:
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, self.deadline - time.monotonic()))
            stop(process)
        self.processes = []


def say(log, line: str) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def print_tables(out: Path, log) -> None:
    from bench.gpu import report

    result = read(out)
    say(log, report.markdown(result))
    try:
        report.draw(result, out / "gpu.png")
    except Exception as error:  # the numbers are saved; a figure can be drawn from them again
        say(log, f"no figure: {error}")


if __name__ == "__main__":
    sys.exit(main())
