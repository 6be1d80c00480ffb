"""Loads the language model and its tokenizer, and puts the LoRA adapter on.

Separate from the trainer so that evaluation, benches and tests get exactly the model a run trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atesd.config.checks import FLASH_PACKAGES, SPECIAL_MODEL
from atesd.models.recompute import recompute_activations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from atesd.config import ATESDConfig
    from atesd.config.eval_config import EvalConfig


class ModelLoadError(RuntimeError):
    """A model that cannot be loaded: the message says which, why, and what to do."""


def load_model_and_tokenizer(config: ATESDConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model a run trains, on the CPU and in train mode, with its tokenizer.

    Base weights are held in `torch_dtype`; with `use_peft` they are frozen and a float32 LoRA adapter (a `PeftModel`)
    is trained on top, initialised from torch's global random state. The tokenizer pads on the left and has a pad token.

    Raises:
        ModelLoadError: no such folder or Hub id, a damaged folder, or LoRA targets the model does not have.

    Example:
        >>> from atesd.config import ATESDConfig
        >>> model, tokenizer = load_model_and_tokenizer(ATESDConfig())  # doctest: +SKIP
    """
    tokenizer = load_tokenizer(config)
    return load_model(config), tokenizer


def load_tokenizer(config: ATESDConfig | EvalConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which pads on the left and has a pad token. Raises ModelLoadError."""
    from transformers import AutoTokenizer

    with errors_for_people(config):
        tokenizer = AutoTokenizer.from_pretrained(model_path(config.model_name_or_path))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ATESDConfig | EvalConfig) -> PreTrainedConfig:
    """The model's own configuration, without its weights. Raises ModelLoadError."""
    from transformers import AutoConfig

    with errors_for_people(config):
        return AutoConfig.from_pretrained(model_path(config.model_name_or_path))


def context_length(model_config: PreTrainedConfig) -> int:
    """Tokens a prompt and its response may have together. Raises ModelLoadError where `model_config` does not say."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ModelLoadError(
            f"the configuration of this {model_config.model_type!r} model has no max_position_embeddings, so what fits "
            "into it is not known: write the number into the model's config.json"
        )
    return length


def load_base(config: ATESDConfig | EvalConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model as it is stored, without an adapter. Without an attention named, see `default_attention`."""
    import torch
    from transformers import AutoModelForCausalLM

    path = model_path(config.model_name_or_path)
    attn_implementation = attn_implementation or default_attention(load_model_config(config))
    with errors_for_people(config):
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.torch_dtype), attn_implementation=attn_implementation
        )


def load_model(config: ATESDConfig) -> PreTrainedModel:
    """The model alone; see `load_model_and_tokenizer`."""
    check_kernels(config)
    model = load_base(config, attention_of(config))
    if config.use_liger_kernel:
        use_liger_kernels(model)
    if config.use_peft:
        model = add_lora(model, config)
    if config.gradient_checkpointing:
        recompute_activations(model, config.gradient_checkpointing_mode)
    return model.train()


def attention_of(config: ATESDConfig) -> str | None:
    """The attention that was asked for by name; None for sdpa, which not every model can have (`default_attention`)."""
    return None if config.attn_implementation == "sdpa" else config.attn_implementation


def default_attention(model_config: PreTrainedConfig) -> str | None:
    """eager for a model that caps its attention scores (Gemma 2); None lets transformers choose, which is mostly sdpa.

    sdpa has no cap: up to 5.17 at least, transformers chooses it for Gemma 2 and leaves the cap out without a word.
    """
    configs = (model_config, model_config.get_text_config())
    capped = any(getattr(part, "attn_logit_softcapping", None) is not None for part in configs)
    return "eager" if capped else None


def check_kernels(config: ATESDConfig) -> None:
    """Raises ModelLoadError, before a model is loaded, for layers' kernels that were asked for and cannot run here."""
    import torch

    gpu = torch.cuda.is_available()
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ModelLoadError("use_liger_kernel is on, and liger-kernel is not installed: pip install 'atesd[gpu]'")
    if config.use_liger_kernel and not gpu:
        raise ModelLoadError("use_liger_kernel is on, and its kernels need a GPU, of which there is none: leave it off")
    if config.attn_implementation in FLASH_PACKAGES and not gpu:
        raise ModelLoadError(
            f"attn_implementation is {config.attn_implementation!r}, which needs a GPU, of which there is none: set it "
            "to 'sdpa'"
        )


def use_liger_kernels(model: Any) -> None:
    """Liger's norms, rotary embedding and gated MLP in place of the model's; the loss stays that of atesd_kernels.

    Raises:
        ModelLoadError: for a model Liger has no kernels for.
    """
    from liger_kernel.transformers import monkey_patch as liger

    kind = model.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ModelLoadError(f"use_liger_kernel is on, and Liger has no kernels for {kind!r}; it has them for {known}")
    liger._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


@contextmanager
def errors_for_people(config: ATESDConfig | EvalConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"model_name_or_path is {config.model_name_or_path!r}, which does not load: {first_line(error)}\n"
            f"Give a folder with a model and tokenizer, a Hub id you can reach from here, or {SPECIAL_MODEL!r}."
        ) from error


def model_path(name: str) -> str:
    if name == SPECIAL_MODEL:
        from atesd.models.smollm import smollm2_path

        return str(smollm2_path())
    local = Path(name).expanduser()
    if local.is_dir() and not (local / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in local.iterdir())[:8]) or "nothing"
        raise ModelLoadError(f"model_name_or_path is {name!r}, a folder without config.json; it holds: {found}")
    return str(local) if local.is_dir() else name


def add_lora(model: Any, config: ATESDConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    try:
        # Adapters of a bfloat16 base are float32: AdamW's small steps would be lost in bfloat16.
        return get_peft_model(model, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelLoadError(f"lora_target_modules is {targets!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
