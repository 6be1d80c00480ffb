"""The settings of an evaluation: every one with its default, what it does and where the default comes from.

The defaults are the protocol that OPSD published (arXiv 2601.18734, evaluation settings of its code release). Rollout
settings have the same names as in training but other defaults, so that one factory builds the engine for both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from atesd.config import doors
from atesd.config.checks import check_engine, require
from atesd.config.fields import RolloutFields
from atesd.config.load import config_parser, parse
from atesd.config.options import check_fields, option
from atesd.errors import ConfigError
from atesd.packages import require_packages

# Settings that neither samples nor verdicts depend on: they may differ when an evaluation goes on.
FREE = (
    "output_dir",
    "confidence",
    "num_bootstrap",
    "metrics",
    "grading_processes",
    "rollout_timeout",
    "rollout_retries",
)
LONGEST = 38912  # tokens of a response in OPSD's protocol
FREE += ("vllm_server_base_url", "vllm_kv_cache_bytes", "vllm_enable_sleep_mode")


@dataclass
class EvalModelFields:
    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None,
        "our choice",
        "A folder, a Hub id, or smollm2-135m-instruct. Absent, the model the adapter was trained on.",
        "--model",
    )
    adapter: str | None = option(
        None,
        "our choice",
        "LoRA adapter: a run directory (its last adapter), one of its checkpoints, or peft's folder.",
    )
    torch_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "our choice", "Type of the weights; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    bf16: bool = option(False, "HF", "Decode under bfloat16 autocast.")


@dataclass
class EvalDataFields:
    _argument_group_name = "problems and prompts"

    dataset_name: str | None = option(
        None,
        "our choice",
        "aime24, aime25, hmmt25, gsm_symbolic, a file with problems and answers (JSON, JSONL, CSV or parquet), a saved "
        "dataset, or a Hub name.",
        "--data",
    )
    dataset_split: str | None = option(None, "our choice", "Split to read; absent, the benchmark's, else train.")
    problem_column: str | None = option(None, "our choice", "Column with the problem; absent, the benchmark's.")
    answer_column: str | None = option(None, "our choice", "Column with the answer; absent, the benchmark's.")
    num_problems: int | None = option(
        None, "our choice", "Problems to draw; absent, all. gsm_symbolic needs a number.", at_least=1
    )
    data_seed: int = option(
        1000,
        "our choice",
        "Draws the problems; gsm_symbolic's are then others than a training run's with its seed.",
        at_least=0,
    )
    prompt_templates: str | None = option(None, "our choice", "YAML or JSON file with another student prompt.")
    chat_template_kwargs: str = option(
        '{"enable_thinking": true}',
        "OPSD",
        "JSON passed to the chat template: thinking on, where the model has it.",
        json_object=True,
    )


@dataclass
class EvalRolloutFields(RolloutFields):
    _argument_group_name = "samples"

    num_generations: int = option(12, "paper", "k: samples of each problem.", "--k", at_least=1)
    max_completion_length: int | None = option(
        None,
        "OPSD",
        f"Longest response in tokens; absent, {LONGEST}, or what the model's context leaves beside the longest prompt.",
        "--max_new_tokens",
        at_least=1,
    )
    temperature: float = option(1.0, "OPSD", "Sampling temperature.", above=0)
    top_p: float = option(
        1.0, "OPSD", "Nucleus sampling; 1 is off, as OPSD states (its script falls back to 0.95).", above=0, at_most=1
    )
    top_k: int = option(0, "OPSD", "Top-k sampling; 0 is off.", at_least=0)
    batch_size: int | None = option(
        None, "our choice", "Responses asked of the engine at a time; absent, 16 of hf and 512 of vllm.", at_least=1
    )
    seed: int = option(0, "our choice", "Seed of the samples; each has one of its own, drawn from this.", at_least=0)


@dataclass
class EvalGradingFields:
    _argument_group_name = "grading and statistics"

    box_only: bool = option(
        True, "OPSD", "Count the last \\boxed{} only; off, a #### line or the last expression is an answer as well."
    )
    grading_time_limit: float = option(
        5.0, "OPSD", "Seconds math-verify may take for one answer; then it is wrong.", above=0
    )
    grading_processes: int = option(2, "our choice", "Processes that grade.", at_least=1)
    confidence: float = option(0.95, "our choice", "Level of the bootstrap intervals.", above=0, below=1)
    num_bootstrap: int = option(10_000, "our choice", "Resamples of the problems.", at_least=1)
    metrics: str | None = option(
        None,
        "our choice",
        "Metrics of yours beside the built-in ones: module:function, with commas between. Each takes the samples of "
        "one problem (rows of samples.jsonl) and returns a number, which is averaged over the problems.",
    )


@dataclass
class EvalRunFields:
    _argument_group_name = "output"

    output_dir: str | None = option(
        None, "our choice", "Folder of the results; absent, evals/DATA-MODEL. An evaluation found there goes on."
    )


GROUPS = (EvalModelFields, EvalDataFields, EvalRolloutFields, EvalGradingFields, EvalRunFields)


@dataclass
class EvalConfig(EvalRunFields, EvalGradingFields, EvalRolloutFields, EvalDataFields, EvalModelFields):
    """Everything an evaluation needs to know.

    Example:
        >>> config = load_eval_config(["--model", "smollm2-135m-instruct", "--data", "aime24"])
        >>> config.num_generations, config.temperature, config.output_dir
        (12, 1.0, 'evals/aime24-smollm2-135m-instruct')
    """

    def validate(self) -> None:
        """Raises ConfigError naming the first field that cannot be used, before anything loads."""
        if self.model_name_or_path is None and self.adapter is None:
            raise ConfigError("there is nothing to evaluate: give --model PATH, or --adapter RUN")
        if self.dataset_name is None:
            raise ConfigError("there is nothing to evaluate on: give --data, e.g. aime24, gsm_symbolic or a JSONL file")
        if self.dataset_name == "gsm_symbolic" and self.num_problems is None:
            raise ConfigError("gsm_symbolic makes as many problems as are asked for: give --num_problems, 100 say")
        check_fields(self)
        require_packages("an evaluation", "math_verify", "matplotlib")
        for name in ("importance_clip", "max_staleness"):
            require(self, name, not getattr(self, name), "left out: it is a setting of training")
        check_engine(self)
        doors.load_metrics(self.metrics)
        for name in ("adapter", "prompt_templates"):
            path = getattr(self, name)
            require(self, name, path is None or Path(path).exists(), "a path that exists")


def eval_parser() -> Any:
    usage = "atesd eval --model PATH --data NAME_OR_FILE [--flag value ...]"
    usage += "\n       atesd eval --adapter RUN [--model PATH] --data NAME_OR_FILE [--flag value ...]"
    usage += "\n       atesd eval --compare RUN_A RUN_B [...] [--output_dir FOLDER]"
    return config_parser(GROUPS, "atesd eval", usage)


def load_eval_config(flags: list[str]) -> EvalConfig:
    """A validated configuration from command-line flags.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type, or settings that cannot be used.
    """
    config = parse(eval_parser(), flags, EvalConfig)
    config.validate()
    return with_defaults(config)


def with_defaults(config: EvalConfig) -> EvalConfig:
    """Returns a valid configuration with the settings filled in that depend on others."""
    evaluated = config.adapter or config.model_name_or_path or ""
    name = f"{short_name(config.dataset_name or '')}-{short_name(evaluated)}"
    return replace(
        config,
        batch_size=config.batch_size or (16 if config.rollout_engine == "hf" else 512),
        output_dir=config.output_dir or f"evals/{name}",
    )


def short_name(path: str) -> str:
    """The last telling part of a path or Hub name: runs/mine/checkpoints/step-000010 -> mine-step-000010."""
    parts = [part for part in Path(path).expanduser().parts if part not in ("/", "..", ".", "checkpoints", "adapter")]
    last = parts[-1] if parts else "model"
    if last.startswith("step-") and len(parts) > 1:
        last = f"{parts[-2]}-{last}"
    stem = Path(last).stem if Path(path).suffix in (".jsonl", ".json", ".parquet", ".csv") else last
    return re.sub(r"[^\w.+-]+", "-", stem)
