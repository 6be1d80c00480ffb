"""A whole training step, ours and TRL's, on the same work: seconds by phase, tokens/s and peak memory.

    python -m bench.step_vs_trl [--precision fp32] [--steps 2] [--rounds 3] [--prompts 8] [--only TEXT]

Every row comes from a process of its own: the same model with all its parameters trained, the same chat prompts for
student and teacher (which reads the whole solution), responses of exactly `max_completion_length` tokens, the same
precision, forward KL over the full vocabulary without clips, AdamW. The first step warms up and is not counted; the
figure is the median of the others. With `--rounds` each row has that many processes, in turn with those of the other
rows, since a machine may be slower for some minutes. The row is that of the median process, with the largest peak.

Both sides run with all prompts in one micro-batch and in micro-batches of `--micro_batch` prompts, and ours in those of
one too, each with gradient checkpointing on (TRL's default) and off; our loop keeps freed memory. Time and memory are
compared in one setting of each side: TRL's is its natural one, all prompts in one micro-batch and nothing computed
twice, and ours the one that is furthest below both limits. Beside that our best row is compared with the best of TRL's,
each for itself: its fastest setting and its smallest are not the same one.

`DistillationTrainer` is TRL's other on-policy distillation, with a loss that never holds whole logits. It shows the
teacher the student's own prompt and has no place for another, so it cannot do this work: its rows, marked, have the
teacher read the problem alone, which is fewer tokens and a loss of zero at the start. They are no part of the ratios.
`GKDTrainer` has the same limit, a dense loss, and one generation for each micro-batch; TRL itself points from it to
`DistillationTrainer`.

Each precision has its result, bench/results/step_vs_trl-<precision>.json, saved after every row. `--only TEXT` measures
the rows whose name holds TEXT, may be given again, and keeps the others, if this machine and these versions made them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from bench import machine
from bench.entrants import DTYPES
from bench.machine import ROOT, load, markdown, native_precision, save, versions
from bench.progress import say

SIDES = {
    "atesd": "atesd",
    "sdft": "TRL SDFTTrainer",
    "distillation": "TRL DistillationTrainer (its teacher reads the problem only)",
}
# Our aims: the most time and memory of a step, as shares of TRL's.
LIMITS = {"fp32": {"seconds": 0.5, "peak": 0.5}, "bf16": {"seconds": 0.55, "peak": 0.5}}
PHASES = ("rollout", "teacher", "student", "loss_backward", "optimizer")


def settings(args: argparse.Namespace):
    """One configuration for both sides."""
    from atesd.config import ATESDConfig

    return ATESDConfig(
        model_name_or_path=args.model,
        num_train_problems=args.prompts * (args.steps + 1),
        num_probe_problems=0,
        grounding="none",
        exposure_policy="full",
        use_peft=False,
        bf16=args.precision == "bf16",
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.prompts // args.micro_batch,
        gradient_checkpointing=args.checkpointing,
        keep_freed_memory=True,
        max_prompt_length=2048,
        max_completion_length=args.max_completion_length,
        temperature=1.1,
        top_p=args.top_p,
        top_k=args.top_k,
        scoring_temperature=1.1,
        entry_clip=None,
        learning_rate=1e-6,
        max_grad_norm=0.1,
        max_steps=args.steps + 1,
        save_steps=10**6,
        output_dir=tempfile.mkdtemp(prefix="step-vs-trl-"),
        seed=0,
    )


def run_atesd(args: argparse.Namespace) -> dict:
    from atesd.run import Run
    from atesd.trainer import Trainer

    trainer = Trainer(Run.build(settings(args)))
    trainer.run.rollout.engine.stop_ids = [-1]  # no token ends a response: both sides write the same number
    rows, cpu = [], []
    for t in range(args.steps + 1):
        start = time.process_time()
        rows.append(trainer.train_step(t)[0])
        cpu.append(time.process_time() - start)
    rows, cpu = rows[1:], cpu[1:]
    seconds = {p: statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    return {
        "seconds": statistics.median(row["seconds_step"] for row in rows),
        "cpu_seconds": statistics.median(cpu),
        "phases": seconds,
        "loss": rows[-1]["loss"],
    }


def run_trl(args: argparse.Namespace) -> dict:
    import datasets
    import torch
    from transformers import TrainerCallback

    from atesd.data.problems import load_problems
    from atesd.data.prompts import PromptBuilder
    from atesd.data.segmentation import split_reference
    from atesd.models.loading import load_model_and_tokenizer

    config = settings(args)
    torch.manual_seed(config.seed)
    problems = load_problems(
        config.dataset_name, num_train=config.num_train_problems, num_probe=0, num_eval=0, seed=config.seed
    )
    model, tokenizer = load_model_and_tokenizer(config)
    words = PromptBuilder(tokenizer, max_prompt_length=2048, max_completion_length=128, context_length=8192)
    rows = [
        {
            "prompt": [{"role": "user", "content": words.student_text(p)}],
            "privileged_context": words.teacher_text(p, split_reference(p.solution, p.answer), 1.0),
        }
        for p in problems.train
    ]

    class Clock(TrainerCallback):
        """Steps are timed from end to end: generation happens before a step's own begin callback."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            self.ends.append((time.perf_counter(), time.process_time()))

    clock = Clock()
    shared = {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.prompts // args.micro_batch,
        "max_completion_length": config.max_completion_length,
        "generation_kwargs": {"min_new_tokens": config.max_completion_length},
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "bf16": config.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": args.checkpointing,
        "learning_rate": config.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": config.max_grad_norm,
        "lr_scheduler_type": "constant",
        "max_steps": config.max_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": config.seed,
    }
    make = {"sdft": sdft_trainer, "distillation": distillation_trainer}[args.side]
    data = {"processing_class": tokenizer, "train_dataset": datasets.Dataset.from_list(rows), "callbacks": [clock]}
    trainer = make(model, shared, data, config)
    phases: dict[str, list[float]] = {"rollout": [], "loss_forward": [], "backward": []}

    def time_calls(owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            answer = function(*args, **kwargs)
            phases[phase].append(time.perf_counter() - start)
            return answer

        setattr(owner, name, timed)

    time_calls(trainer, "_generate", "rollout")
    time_calls(trainer, "compute_loss", "loss_forward")  # teacher, student and loss
    time_calls(trainer.accelerator, "backward", "backward")
    trainer.train()
    wall, cpu = zip(
        *((b[0] - a[0], b[1] - a[1]) for a, b in zip(clock.ends, clock.ends[1:], strict=False)), strict=True
    )
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "phases": {name: median_of_steps(seconds, config.max_steps) for name, seconds in phases.items()},
        "loss": trainer.state.log_history[-2]["loss"],
    }


def sdft_trainer(model, shared: dict, data: dict, config):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

    class WholeTeacherPrompt(DemonstrationTeacherContextBuilder):
        """Our teacher prompt, to the letter."""

        def _compose_teacher_prompt(self, prompt, privileged_context):
            return [{"role": "user", "content": privileged_context}]

    own = {
        "num_generations": 1,
        "max_prompt_length": config.max_prompt_length,
        "distillation_mode": "full_logits",
        "distillation_alpha": 0.0,
        "distillation_is_clip": None,
        "teacher_model_kind": "base",
    }
    trainer = SDFTTrainer(model=model, args=SDFTConfig(**shared, **own), **data)
    trainer.teacher_context_builder = WholeTeacherPrompt(trainer)
    return trainer


def distillation_trainer(model, shared: dict, data: dict, config):
    import copy

    from trl import DistillationConfig, DistillationTrainer

    arguments = DistillationConfig(**shared, beta=0.0)  # forward KL
    return DistillationTrainer(model=model, teacher_model=copy.deepcopy(model), args=arguments, **data)


def median_of_steps(seconds: list[float], steps: int) -> float:
    """Calls of a phase, several a step, as the median over the counted steps of their sum."""
    calls = len(seconds) // steps
    sums = [sum(seconds[step * calls : (step + 1) * calls]) for step in range(steps)]
    return statistics.median(sums[1:])


def of_rounds(rows: list[dict]) -> dict:
    """The row with the median time (of two, the faster), the largest peak of all, and the times of all."""
    middle = sorted(rows, key=lambda row: row["seconds"])[(len(rows) - 1) // 2]
    return {**middle, "peak": max(row["peak"] for row in rows), "rounds": [row["seconds"] for row in rows]}


def in_fresh_process(name: str, side: str, micro_batch: int, checkpointing: bool, flags: list[str]) -> dict:
    say(f"{name}, {' '.join(flags)}")
    command = [sys.executable, "-m", "bench.step_vs_trl", *flags, "--side", side]
    command += ["--micro_batch", str(micro_batch), f"--{'' if checkpointing else 'no-'}checkpointing"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        print(f"\n{run.stderr[-4000:]}", file=sys.stderr)
        raise SystemExit(f"{name} ended with status {run.returncode}")
    row = {"name": name, **json.loads(run.stdout.splitlines()[-1])}
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["phases"].items())
    say(
        f"  {row['seconds']:.1f} s a step, {row['cpu_seconds']:.1f} CPU seconds, peak {row['peak'] / 1e9:.2f} GB "
        f"({phases}), loss {row['loss']:.4g}"
    )
    return row


def peak_bytes() -> int:
    """Of this process: the GPU's allocator, or the largest resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def without_rollouts(row: dict) -> float:
    return row["seconds"] - row["phases"]["rollout"]


def table(result: dict) -> str:
    rows = [
        [
            row["name"],
            f"{row['seconds']:.1f}" + spread(row),
            f"{without_rollouts(row):.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{result['tokens'] / row['seconds']:.0f}",
            f"{row['peak'] / 1e9:.2f}",
            ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["phases"].items()),
        ]
        for row in result["rows"]
    ]
    header = ["whole step", "seconds", "without rollouts", "CPU seconds", "tokens/s", "peak GB", "of it, seconds"]
    return markdown(header, rows)


def spread(row: dict) -> str:
    """Of a row that was measured in several rounds; older results know none."""
    rounds = row.get("rounds", [])
    return f" ({min(rounds):.1f} - {max(rounds):.1f})" if len(rounds) > 1 else ""


def row_name(side: str, micro_batch: int, checkpointing: bool) -> str:
    return f"{SIDES[side]}, micro-batches of {micro_batch}" + (", checkpointing" if checkpointing else "")


def one_setting(result: dict, limits: dict[str, float]) -> tuple[str, str, dict[str, float]] | None:
    """Names of our row and of TRL's natural one, and our time and memory over its; None where one is missing. Ours is
    the row whose larger ratio, each over its limit of `limits`, is the smallest."""
    rows = {row["name"]: row for row in result["rows"]}
    natural = row_name("sdft", result["shape"][0], checkpointing=False)
    found = [
        (name, {what: row[what] / rows[natural][what] for what in limits})
        for name, row in rows.items()
        if name.startswith(SIDES["atesd"]) and natural in rows
    ]
    if not found:
        return None
    name, shares = min(found, key=lambda f: max(f[1][what] / limit for what, limit in limits.items()))
    return name, natural, shares


def ratios(result: dict) -> dict[str, float]:
    """Our fastest row's time, its time without rollouts, and our smallest memory, over TRL's best for the same work."""
    ours, theirs = ([r for r in result["rows"] if r["name"].startswith(SIDES[s])] for s in ("atesd", "sdft"))
    measures = {"seconds": lambda r: r["seconds"], "without_rollouts": without_rollouts, "peak": lambda r: r["peak"]}
    return {n: min(map(f, ours)) / min(map(f, theirs)) for n, f in measures.items() if ours and theirs}


def kept_rows(name: str, shape: list) -> dict[str, dict]:
    """By name, the rows already saved that may stand beside new ones."""
    if not machine.names_of(name):
        return {}
    old, here = load(name), machine.machine()
    same = all(old["machine"][key] == here[key] for key in ("cpu", "cores", "ram_gib"))
    same = same and machine.processor_kind(old["machine"]) == machine.processor_kind(here)
    same = same and old["versions"] == versions() and old["shape"] == shape
    return {row["name"]: row for row in old["rows"]} if same else {}


def main(flags: list[str] | None = None) -> None:
    flags = sys.argv[1:] if flags is None else flags
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", choices=DTYPES, default=native_precision(), help="default: what trains fastest")
    parser.add_argument("--steps", type=int, default=2, help="counted steps")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each row, in turn with those of the others")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=2, help="prompts in the smaller micro-batches of both")
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--top_p", type=float, default=1.0, help="of both; TRL sorts the whole vocabulary below 1")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="TEXT", help="only rows whose name holds this, or another")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    args = parser.parse_args(flags)
    if args.side:
        result = (run_atesd if args.side == "atesd" else run_trl)(args)
        print(json.dumps({**result, "peak": peak_bytes()}))
        return
    sizes = {"atesd": (args.prompts, args.micro_batch, 1), "sdft": (args.prompts, args.micro_batch)}
    how = [(s, size, ckpt) for s in sizes for size in dict.fromkeys(sizes[s]) for ckpt in (True, False)]
    how += [("distillation", args.prompts, checkpointing) for checkpointing in (True, False)]
    result_name = f"step_vs_trl-{args.precision}"
    shape = [args.prompts, args.max_completion_length, args.top_p, args.top_k, args.model]
    result = {"tokens": args.prompts * args.max_completion_length, "shape": shape, "rows": []}
    rows = kept_rows(result_name, shape)
    measured: dict[str, list[dict]] = {}
    for side, size, checkpointing in how * args.rounds:
        name = row_name(side, size, checkpointing)
        if not args.only or any(text in name for text in args.only):
            measured.setdefault(name, []).append(in_fresh_process(name, side, size, checkpointing, flags))
            rows[name] = of_rounds(measured[name])
            order = [*SIDES.values()]
            result["rows"] = sorted(
                rows.values(), key=lambda row: (order.index(row["name"].split(", ")[0]), row["seconds"])
            )
            save(result_name, result)
    print(table(result))
    if setting := one_setting(result, LIMITS[args.precision]):
        ours, theirs, shares = setting
        print(f"{ours}: {shares['seconds']:.2f} of the time and {shares['peak']:.2f} of the memory of {theirs}")
    for what, ratio in ratios(result).items():
        print(f"our best {what}: {ratio:.2f} of the best of {SIDES['sdft']}")


if __name__ == "__main__":
    main()
