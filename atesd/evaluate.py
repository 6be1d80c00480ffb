"""An evaluation: k sampled answers to each problem, graded, written as they come, and summed up.

`answers` and `summarise` are what an evaluation is, and what training runs as well every `eval_steps`; `evaluate` is
the command around them: it finds model and problems, refuses what cannot work before any weight is loaded, and goes on
where a killed evaluation stopped.

Samples are drawn in batches whose composition is a function of the settings. A batch that was cut off is drawn again
whole and only what is missing of it is kept, so a resumed evaluation has the samples of an uninterrupted one, to the
last bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from atesd import __version__
from atesd.batching import chunks
from atesd.benchmarks import load_benchmark, seen_in_training
from atesd.config_checks import ConfigError
from atesd.eval_config import FREE, EvalConfig
from atesd.eval_files import RESULTS, EvalError, SampleFile, claim, fingerprint, seed_of, write_json
from atesd.eval_model import base_model, find_adapter, find_run, load_student
from atesd.eval_report import write_reports
from atesd.eval_stats import estimate, majority_vote, pass_at, pass_at_levels
from atesd.eval_votes import votes
from atesd.grading import Grader
from atesd.models import context_length, load_model_config, load_tokenizer, model_path
from atesd.problems import Problem
from atesd.prompts import PromptBuilder
from atesd.rollout import RolloutEngine, Sampling, make_engine
from atesd.templates import PromptTemplates

# What OPSD's evaluation asks, to the letter.
PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PACKAGES = ("torch", "transformers", "peft", "math-verify", "vllm")

Sample = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How each problem is answered: `k` samples, drawn `batch_size` at a time."""

    k: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    batch_size: int

    def sampling(self, seeds: tuple[int, ...]) -> Sampling:
        return Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k, seeds)


def answers(
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    engine: RolloutEngine,
    tokenizer: Any,
    grader: Grader,
    protocol: Protocol,
    done: frozenset[tuple[str, int]] = frozenset(),
) -> Iterator[list[Sample]]:
    """Samples every problem `k` times; yields the graded samples batch by batch, without those in `done`.

    Args:
        prompts: token ids, one prompt for each problem.
        done: (problem id, sample index) of samples that are there already.

    Yields:
        Lists of samples: `problem_id`, `sample`, `seed`, `text`, `extracted`, `correct`, `reason` (the grader's),
        `finish_reason` ("stop", "length", or "nonfinite" where the model's logits were not), `num_tokens`.
    """
    grid = [(index, sample) for index in range(len(problems)) for sample in range(protocol.k)]
    for part in chunks(len(grid), protocol.batch_size):
        batch = [(problems[index], prompts[index], sample) for index, sample in grid[part]]
        if all((problem.id, sample) in done for problem, _, sample in batch):
            continue
        seeds = tuple(seed_of(protocol.seed, problem.id, sample) for problem, _, sample in batch)
        rollouts = engine.generate([prompt for _, prompt, _ in batch], protocol.sampling(seeds))
        texts = [tokenizer.decode(rollout.response_ids, skip_special_tokens=True) for rollout in rollouts]
        verdicts = grader.grade_many(texts, [problem.answer for problem, _, _ in batch])
        yield [
            {
                "problem_id": problem.id,
                "sample": sample,
                "seed": seed,
                "text": text,
                **asdict(verdict),
                "finish_reason": "length" if rollout.truncated else "stop" if rollout.finite else "nonfinite",
                "num_tokens": len(rollout.response_ids),
            }
            for (problem, _, sample), seed, rollout, text, verdict in zip(
                batch, seeds, rollouts, texts, verdicts, strict=True
            )
            if (problem.id, sample) not in done
        ]


def summarise(
    samples: Sequence[Sample], k: int, grader: Grader, confidence: float, num_bootstrap: int
) -> dict[str, Any]:
    """`{"metrics": {name: {value, low, high}}, "problems": {id: {metric: value}}}` of complete samples.

    Metrics, each a mean over problems: `average@k` (share of right samples), unbiased `pass@j`, `maj@k`,
    `response_length` in tokens, `truncated` (share cut by the limit), `no_answer` (share without an answer).
    """
    by_problem: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_problem[sample["problem_id"]].append(sample)
    rows: dict[str, dict[str, float]] = {}
    for (name, own), cast in zip(by_problem.items(), votes(list(by_problem.values()), grader), strict=True):
        correct = [s["correct"] for s in own]
        rows[name] = {
            f"average@{k}": sum(correct) / k,
            **{f"pass@{j}": pass_at(j, sum(correct), k) for j in pass_at_levels(k)},
            f"maj@{k}": majority_vote(cast, correct),
            "response_length": sum(s["num_tokens"] for s in own) / k,
            "truncated": sum(s["finish_reason"] == "length" for s in own) / k,
            "no_answer": sum(s["extracted"] is None for s in own) / k,
        }
    table = np.array([list(row.values()) for row in rows.values()])
    names = list(next(iter(rows.values())))
    estimates = estimate(table, confidence, num_bootstrap)
    return {"metrics": dict(zip(names, map(asdict, estimates), strict=True)), "problems": rows}


def evaluate(config: EvalConfig) -> Path:
    """Evaluate as `config` says and return the folder with `results.json`, `results.md` and `results.html`.

    Raises:
        ValueError, ModelLoadError: settings, problems or a model that cannot be used, before any sample is drawn.
    """
    config.validate()
    folder = Path(config.output_dir)
    adapter = find_adapter(config.adapter) if config.adapter else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = replace(
        config,
        model_name_or_path=base_model(config, adapter),
        adapter=str(adapter) if adapter else None,
        torch_dtype=resolve_dtype(config.torch_dtype, device),
    )
    problems = load_benchmark(resolved)
    tokenizer = load_tokenizer(resolved)
    prompts = build_prompts(resolved, tokenizer, problems)
    claim(folder, record(resolved, problems, adapter, device), (*FREE, "versions"))

    with SampleFile(folder) as file:
        expected = {(p.id, s): seed_of(config.seed, p.id, s) for p in problems for s in range(config.num_generations)}
        done = frozenset((row["problem_id"], row["sample"]) for row in file.rows)
        wrong = [row for row in file.rows if expected.get((row["problem_id"], row["sample"])) != row["seed"]]
        if wrong or len(done) < len(file.rows):
            raise EvalError(f"{file.path} holds samples that are not of this evaluation: choose another --output_dir")
        if done == expected.keys() and (folder / RESULTS).is_file():
            return write_reports(folder)
        grader = Grader(config.grading_processes, config.grading_time_limit, config.box_only)
        with grader:
            if done != expected.keys():
                model = load_student(resolved, adapter, device)
                engine = make_engine(resolved, model, tokenizer)
                draw(resolved, problems, prompts, engine, tokenizer, grader, file, done)
            results = summarise(
                in_order(file.rows, problems), config.num_generations, grader, config.confidence, config.num_bootstrap
            )
    run = find_run(adapter) if adapter else None
    seen = seen_in_training(problems, run) if run else None
    write_json(folder / RESULTS, {**results, "seen_in_training": seen})
    return write_reports(folder)


def draw(
    config: EvalConfig,
    problems: list[Problem],
    prompts: list[list[int]],
    engine: RolloutEngine,
    tokenizer: Any,
    grader: Grader,
    file: SampleFile,
    done: frozenset[tuple[str, int]],
) -> None:
    """Draws what is missing into `file`, with a progress bar."""
    protocol = Protocol(
        config.num_generations, config.max_completion_length, config.temperature, config.top_p, config.top_k,
        config.seed, config.batch_size,
    )  # fmt: skip
    total, started, tokens = len(problems) * protocol.k, time.perf_counter(), 0
    with tqdm(total=total, initial=len(done), desc="samples") as bar:
        for batch in answers(problems, prompts, engine, tokenizer, grader, protocol, done):
            file.append(batch)
            tokens += sum(row["num_tokens"] for row in batch)
            right = sum(row["correct"] for row in file.rows) / len(file.rows)
            bar.set_postfix({"right": f"{right:.1%}", "tok/s": f"{tokens / (time.perf_counter() - started):.0f}"})
            bar.update(len(batch))


def build_prompts(config: EvalConfig, tokenizer: Any, problems: list[Problem]) -> list[list[int]]:
    """Prompts as token ids; refuses, before any weight is loaded, a limit that does not fit beside the longest."""
    context = context_length(load_model_config(config))
    templates = PromptTemplates.from_file(config.prompt_templates) if config.prompt_templates else None
    kwargs = json.loads(config.chat_template_kwargs)
    builder = PromptBuilder(
        tokenizer,
        templates or PromptTemplates(student=PROMPT),
        student_chat_kwargs=kwargs,
        teacher_chat_kwargs=kwargs,
        max_prompt_length=context,
        max_completion_length=1,
        context_length=context,
    )
    prompts = [builder.student(problem) for problem in problems]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    room = context - len(prompts[longest])
    if config.max_completion_length > room:
        raise ConfigError(
            f"max_completion_length is {config.max_completion_length}, but the context of {config.model_name_or_path} "
            f"has {context} tokens, and the longest prompt ({problems[longest].id}) takes {len(prompts[longest])} of "
            f"them: give --max_new_tokens {room} or fewer, or use a model with a longer context"
        )
    return prompts


def record(config: EvalConfig, problems: list[Problem], adapter: Path | None, device: torch.device) -> dict[str, Any]:
    """All that decides the samples and verdicts, defaults included, for `eval_config.json`."""
    contents = json.dumps([asdict(problem) for problem in problems], sort_keys=True)
    versions = {"atesd": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "settings": asdict(config),
        "prompt": PROMPT
        if config.prompt_templates is None
        else Path(config.prompt_templates).read_text(encoding="utf-8"),
        "problems": {"count": len(problems), "digest": hashlib.sha256(contents.encode()).hexdigest()[:16]},
        "model": {"files": fingerprint(model_path(config.model_name_or_path))},
        "adapter": {"files": fingerprint(adapter) if adapter else None},
        "device": device.type,
        "versions": versions,
    }


def in_order(rows: list[Sample], problems: list[Problem]) -> list[Sample]:
    position = {problem.id: index for index, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: (position[row["problem_id"]], row["sample"]))


def resolve_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
