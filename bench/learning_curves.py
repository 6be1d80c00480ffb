"""Does the student learn? SmolLM2-135M on gsm_symbolic, ATESD and OPSD, three seeds: start against end.

    python -m bench.learning_curves                    the next run that has no result yet (six in all; minutes each)
    python -m bench.learning_curves --all              all that are left
    python -m bench.learning_curves --only atesd-1     this one

Each run is the recipe gsm-symbolic, with `exposure_policy` as it is (ATESD) or `full` (OPSD). Before the first step and
after the last the student is measured on 24 held-out problems that no run trains on: mean token KL of the teacher that
reads the whole solution (alpha = 1, for both methods) on rollouts of fixed seeds, the NLL of the reference solutions,
and right answers. A run that was stopped goes on where it stopped. Results: bench/results/learning_curves/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.machine import markdown, save

METHODS = {"atesd": [], "opsd": ["--exposure_policy", "full"]}
SEEDS = (0, 1, 2)
RUNS = [f"{method}-{seed}" for seed in SEEDS for method in METHODS]
FOLDER = "learning_curves"
NUM_PROBLEMS = 24
# of every step of a run, for the curve itself
KEPT = "step alpha loss mismatch probe_nll student_entropy response_length seconds_step seconds_policy".split()


def result_of(run: str) -> Path:
    return machine.RESULTS / FOLDER / f"{run}.json"


def run_one(run: str, flags: list[str], work: Path) -> Path:
    """Train one run (or go on with it) and write its result."""
    from atesd.config import load_config
    from atesd.reports.metrics import METRICS, read_jsonl
    from atesd.run import Run
    from atesd.storage.checkpoint import latest_checkpoint
    from atesd.studies.held_out import measure
    from atesd.trainer import Trainer

    method, seed = run.rsplit("-", 1)
    run_dir = work / run
    own = ["--seed", seed, "--num_eval_problems", str(NUM_PROBLEMS), "--save_steps", "4", "--output_dir", str(run_dir)]
    if latest_checkpoint(run_dir):
        config = load_config(None, ["--resume", str(run_dir)])
    else:
        (run_dir / METRICS).unlink(missing_ok=True)
        config = load_config("gsm-symbolic", [*METHODS[method], *own, *flags])
    start_file = work / f"start-{seed}.json"  # no method has done anything yet: both start from the same numbers
    with closing(Run.build(config)) as built:
        if not start_file.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            start = [asdict(m) for m in measure(built, built.data.problems.eval, 1.0)]
            start_file.write_text(json.dumps(start), encoding="utf-8")
        Trainer(built).train()
        end = [asdict(m) for m in measure(built, built.data.problems.eval, 1.0)]
    rows = [{name: row[name] for name in KEPT if name in row} for row in read_jsonl(run_dir / METRICS)]
    shares = [row["seconds_policy"] / row["seconds_step"] for row in rows if "seconds_policy" in row]
    return save(
        f"{FOLDER}/{run}",
        {
            "method": method,
            "seed": int(seed),
            "steps": len(rows),
            "problems": NUM_PROBLEMS,
            "start": summary(json.loads(start_file.read_text(encoding="utf-8"))),
            "end": summary(end),
            "controller_share_of_a_step": statistics.median(shares),
            "rows": rows,
        },
    )


def summary(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Token KL over all tokens of all rollouts; the others over problems."""
    tokens = sum(m["num_tokens"] for m in measured)
    out = {
        "token_kl": sum(m["mismatch"] * m["num_tokens"] for m in measured) / tokens,
        "reference_nll": statistics.fmean(m["reference_nll"] for m in measured),
    }
    if all(m["correct"] is not None for m in measured):
        out["accuracy"] = statistics.fmean(m["correct"] for m in measured)
    return out


def results() -> list[dict[str, Any]]:
    found = [json.loads(result_of(run).read_text(encoding="utf-8")) for run in RUNS if result_of(run).exists()]
    if not found:
        raise FileNotFoundError(f"{FOLDER}/{RUNS[0]}.json")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """One row for each run there is a result of: start -> end."""
    names = {"token_kl": "mean token KL at alpha = 1", "reference_nll": "held-out reference NLL", "accuracy": "right"}
    names = {name: label for name, label in names.items() if all(name in r["start"] for r in found)}
    rows = [
        [
            f"{r['method'].upper()}, seed {r['seed']}, {r['steps']} steps",
            *(f"{r['start'][name]:.3f} → {r['end'][name]:.3f}" for name in names),
            f"{100 * r['controller_share_of_a_step']:.3f} %",
        ]
        for r in sorted(found, key=lambda r: (r["method"], r["seed"]))
    ]
    return markdown(["run", *names.values(), "exposure policy's share of a step's time"], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.learning_curves", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--all", action="store_true", help="every run that has no result yet, one after the other")
    parser.add_argument("--only", choices=RUNS, help="this run, whether it has a result or not")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "atesd-learning-curves")
    own, flags = parser.parse_known_args(arguments)
    left = [own.only] if own.only else [run for run in RUNS if not result_of(run).exists()]
    for run in left if own.all else left[:1]:
        print(f"{run}: {run_one(run, flags, own.work)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
