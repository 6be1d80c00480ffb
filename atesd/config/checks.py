"""Checks a configuration. Each error names the field, the value seen and what to do instead.

options.py checks single fields; this file checks combinations. It loads no model and no dataset, and does not import
torch. It does import user code named as `module:object`, which may import torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from atesd.config import doors
from atesd.config.fields import MAY_CHANGE, RolloutFields, Settings
from atesd.config.mixture import check_views
from atesd.config.options import check_fields, parse_json
from atesd.config.teachers import check_teacher
from atesd.errors import ConfigError, suggest
from atesd.hub import check_push
from atesd.packages import require_packages
from atesd.storage.folder import already_holds

SPECIAL_MODEL = "smollm2-135m-instruct"
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "trackio")
LEARNED_POLICIES = ("atesd", "one_step")
# the module that attn_implementation needs, and how to get it
FLASH_PACKAGES = {
    "flash_attention_2": (
        "flash_attn",
        "flash-attn, which is built against the installed torch: pip install --no-build-isolation 'atesd[flash]'",
    ),
    "flash_attention_3": (
        "flash_attn_interface",
        "FlashAttention-3, which is built from the folder hopper of https://github.com/Dao-AILab/flash-attention",
    ),
}


def check(config: Settings) -> None:
    """Raises ConfigError for the first setting that cannot be used, MissingPackageError for an absent package."""
    check_fields(config)
    check_engine(config)
    check_policy(config)
    check_combinations(config)
    check_places(config)
    check_packages(config)


def require(config: Settings, name: str, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be {what}")


def check_engine(config: RolloutFields) -> None:
    """Raises ConfigError for an engine that is not known, or cannot be imported, or does not take `rollout_kwargs`."""
    kwargs = parse_json(config.rollout_kwargs)
    doors.check_name("rollout_engine", config.rollout_engine)
    if doors.is_object(config.rollout_engine):
        doors.engine_factory(config.rollout_engine, kwargs)
    else:
        doors.check_shipped_kwargs("rollout_engine", config.rollout_engine, kwargs, "rollout_kwargs")


def check_policy(config: Settings) -> None:
    """Raises ConfigError for a policy that is not known, or cannot be imported, or does not take what it is given."""
    policy, kwargs = config.exposure_policy, parse_json(config.exposure_kwargs)
    doors.check_name("exposure_policy", policy)
    takes_fixed_alpha = policy == "fixed"
    if doors.is_object(policy):
        takes_fixed_alpha = "fixed_alpha" in inspect.signature(doors.policy_factory(policy, kwargs)).parameters
    else:
        doors.check_shipped_kwargs("exposure_policy", policy, kwargs, "exposure_kwargs")
    if policy == "fixed" or (takes_fixed_alpha and config.fixed_alpha is not None):
        given = config.fixed_alpha is not None and 0 <= config.fixed_alpha <= 1
        require(config, "fixed_alpha", given, f"between 0 and 1, for exposure_policy is {policy!r}")
    elif config.fixed_alpha is not None:
        raise ConfigError(
            f"fixed_alpha ({config.fixed_alpha}) would be ignored, for exposure_policy is {policy!r}: "
            f"leave it out, or set exposure_policy to 'fixed'"
        )


def check_combinations(config: Settings) -> None:
    if config.entry_clip is not None and config.token_clip is not None:
        raise ConfigError(
            f"entry_clip ({config.entry_clip}) and token_clip ({config.token_clip}) exclude each other: "
            f"set one of them to 0"
        )
    if config.torch_dtype == "bfloat16" and not config.use_peft:
        raise ConfigError(
            "torch_dtype is 'bfloat16' and use_peft is false: AdamW's updates are smaller than the spacing of bfloat16 "
            "weights, so most would be lost. Keep the weights in float32 (bf16: true makes the forward passes bfloat16)"
        )
    check_divergence(config)
    check_objective(config)
    check_reference(config)
    check_weights(config)
    check_views(config)
    check_teacher(config)
    if config.attn_implementation in FLASH_PACKAGES:
        module, package = FLASH_PACKAGES[config.attn_implementation]
        if find_spec(module) is None:
            raise ConfigError(f"attn_implementation {config.attn_implementation!r} needs {package}")
        if not config.bf16 and config.torch_dtype != "bfloat16":
            raise ConfigError(
                f"attn_implementation {config.attn_implementation!r} has no float32 form: set bf16 to true"
            )
    if config.dataset_name == "gsm_symbolic" and config.num_train_problems is None:
        raise ConfigError(
            "num_train_problems is not set, and gsm_symbolic makes as many as are asked for: set it, to 400 say"
        )
    if config.alpha_min > config.alpha_max:
        raise ConfigError(f"alpha_min ({config.alpha_min}) is above alpha_max ({config.alpha_max}): swap them")
    learned = config.exposure_policy in LEARNED_POLICIES
    if learned and config.policy_batch_size == 1:
        raise ConfigError(
            "policy_batch_size is 1: a decision is judged against the others of its batch, so a policy would learn "
            "nothing from one alone. Set it to 2 or more"
        )
    if learned and config.progress_signal == "probe_nll" and config.num_probe_problems == 0:
        raise ConfigError(
            "progress_signal is 'probe_nll' but num_probe_problems is 0, so there is nothing to measure it on: "
            "set num_probe_problems to 8 or more, or progress_signal to 'distill_loss'"
        )
    if config.eval_steps and config.num_eval_problems == 0:
        raise ConfigError(
            f"eval_steps is {config.eval_steps} but num_eval_problems is 0, so there is nothing to evaluate on: "
            f"set num_eval_problems to 32 or more, or eval_steps to 0"
        )
    trackers = config.report_to.replace(" ", "").split(",")
    for tracker in trackers:
        what = f"made of {', '.join(TRACKERS)}{suggest(tracker, TRACKERS)}"
        require(config, "report_to", tracker in TRACKERS, what)
    alone = trackers == ["none"] or "none" not in trackers
    require(config, "report_to", alone, "none, or trackers without none")
    if config.importance_clip is not None and config.rollout_engine == "hf":
        raise ConfigError(
            f"importance_clip ({config.importance_clip}) would be ignored, for rollout_engine is 'hf', which samples "
            f"from the student itself: leave it out"
        )
    check_staleness(config)


def check_reference(config: Settings) -> None:
    """Raises ConfigError for settings of the teacher's reading that would be ignored."""
    source, changed = config.reference_source, []
    for name, usual in (("reference_source", "own"), ("exposure_order", "leading"), ("segments_column", None)):
        changed += [name] if getattr(config, name) != usual else []
    if changed and config.objective in ("sft", "grpo"):
        raise ConfigError(
            f"objective {config.objective!r} has no teacher, so {changed[0]} ({getattr(config, changed[0])}) would be "
            "ignored: leave it out"
        )
    if source != "none":
        return
    if config.exposure_policy in LEARNED_POLICIES:
        raise ConfigError(
            f"reference_source is 'none', so exposure_policy {config.exposure_policy!r} would learn from an exposure "
            "that changes nothing: set exposure_policy to 'full'"
        )
    if len(changed) > 1:
        raise ConfigError(f"reference_source is 'none', so {changed[1]} would be ignored: leave it out")


def check_weights(config: Settings) -> None:
    column = config.weight_column
    if column is None:
        return
    require(config, "weight_column", bool(column.strip()), "the name of a column, or left out")
    if config.dataset_name == "gsm_symbolic":
        raise ConfigError(
            f"weight_column ({column}) would be ignored, for dataset_name is 'gsm_symbolic', whose problems have no "
            "weights: leave it out"
        )


def check_staleness(config: Settings) -> None:
    if config.max_staleness == 0:
        return
    if config.objective == "sft":
        raise ConfigError("max_staleness is 1, and objective 'sft' trains on references, not rollouts: leave it out")
    why = {
        "hf": "which samples from the very weights that are being updated",
        "vllm": "which shares process and device with the update: nothing would run beside it",
    }
    if config.rollout_engine in why:
        raise ConfigError(
            f"max_staleness is 1, but rollout_engine is {config.rollout_engine!r}, {why[config.rollout_engine]}: set "
            "rollout_engine to 'vllm_server', or max_staleness to 0"
        )


def check_objective(config: Settings) -> None:
    objective, learned = config.objective, config.exposure_policy in LEARNED_POLICIES
    if objective in ("sft", "grpo") and config.exposure_policy != "full":
        raise ConfigError(
            f"objective {objective!r} has no teacher, so exposure_policy {config.exposure_policy!r} has nothing to "
            "choose: set exposure_policy to 'full'"
        )
    if "grpo" in objective:
        require(config, "num_generations", config.num_generations >= 2, f"at least 2, for objective is {objective!r}")
    if config.per_example_exposure and not learned and not doors.is_object(config.exposure_policy):
        raise ConfigError(
            f"per_example_exposure is on, and exposure_policy {config.exposure_policy!r} gives every problem the same "
            f"exposure: choose one of {', '.join(LEARNED_POLICIES)}, or leave it off"
        )
    for name in ("early_stopping_patience", "save_best"):
        if getattr(config, name) and config.num_probe_problems == 0:
            raise ConfigError(f"{name} goes by the probe NLL, but num_probe_problems is 0: set it to 8 or more")


def check_divergence(config: Settings) -> None:
    doors.check_name("divergence", config.divergence)
    if doors.is_object(config.divergence):
        term = doors.load_divergence(config.divergence)
        try:
            term.needs_beta(config.beta)
        except ValueError as error:
            raise ConfigError(f"divergence {config.divergence!r} with beta {config.beta}: {error}") from error
    if (config.divergence, config.beta) in (("skew_kl", 1), ("skew_reverse_kl", 0)):
        raise ConfigError(f"divergence {config.divergence!r} with beta {config.beta} is always zero: change beta")


def check_places(config: Settings) -> None:
    if config.prompt_templates is not None:
        of_lab = config.prompt_templates.startswith("lab/")
        how = " (`atesd lab` makes it)" if of_lab else ""
        require(config, "prompt_templates", Path(config.prompt_templates).is_file(), f"a file that exists{how}")
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        model = getattr(config, name) or ""
        if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().is_dir():
            raise ConfigError(f"{name} is {model!r}, and there is no such folder: give a model's folder or its Hub id")
    data = config.dataset_name
    if data.endswith((".json", ".jsonl", ".parquet")) and not Path(data).expanduser().is_file():
        raise ConfigError(f"dataset_name is {data!r}, and there is no such file: give a file, a folder or a Hub name")
    if config.push_to_hub is not None:
        check_push(config.push_to_hub)
    out = config.resume or config.output_dir
    require(config, "output_dir", out is not None, "a folder for the run")
    require(config, "output_dir", bool(str(out).strip()), "the path of a folder for the run")
    for name in ("config.yaml", "metrics.jsonl"):  # the run looks again once it owns the folder
        if not config.resume and not config.named_by_time and (Path(out) / name).exists():
            raise ConfigError(already_holds("output_dir", out, name))


def check_packages(config: Settings) -> None:
    """Raises MissingPackageError for what a run would import after its last step, or leave out without a word."""
    require_packages("the report of a run", "matplotlib")
    if config.teacher_weights == "4bit":
        require_packages("teacher_weights '4bit'", "bitsandbytes")
    if config.eval_steps or "grpo" in config.objective:
        require_packages(f"grading (eval_steps {config.eval_steps}, objective {config.objective!r})", "math_verify")
    for tracker in config.report_to.replace(" ", "").split(","):
        modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if tracker != "none" and not any(find_spec(module) for module in modules):
            require_packages(f"report_to {tracker!r}", modules[0])


def check_resumable(saved: Settings, given: Settings, output_dir: str | None) -> None:
    """Raises ConfigError if a flag given with `--resume` changes a setting that is not in `MAY_CHANGE`."""
    if output_dir not in (None, given.resume):
        raise ConfigError(f"output_dir is {output_dir!r}, but resume goes on in {given.resume!r}: leave output_dir out")
    may_change = (*MAY_CHANGE, "resume", "output_dir", "dry_run")
    advice = f"or start a new run. What --resume may change: {', '.join(MAY_CHANGE)}"
    check_same_settings(saved, given, may_change, f"the run in {given.resume!r}", advice)


def check_same_settings(saved: Settings, given: Settings, may_change: Collection[str], what: str, advice: str) -> None:
    """Raises ConfigError if a setting outside `may_change` differs from `saved`. `what` names the saved run."""
    for name, value in asdict(given).items():
        before = getattr(saved, name)
        same = value == before or (name.endswith("_kwargs") and parse_json(value) == parse_json(before))
        if isinstance(value, str) and isinstance(before, str) and Path(value).exists():
            same = same or Path(value).absolute() == Path(before).absolute()
        if not same and name not in may_change:
            raise ConfigError(
                f"{name} is {value!r}, but {what} was started with {before!r}: leave the flag out, {advice}"
            )
