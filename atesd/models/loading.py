"""Loads the language model and its tokenizer, and adds the LoRA adapter.

The trainer, evaluation, benches and tests all load their model here, so all get exactly the model that a run trains.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atesd.config.checks import FLASH_PACKAGES, SPECIAL_MODEL
from atesd.errors import AtesdError, first_line
from atesd.hub import unreachable
from atesd.models.recompute import recompute_activations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from atesd.config import ATESDConfig
    from atesd.config.eval_config import EvalConfig

BAR_DELAY = 5.0  # seconds after which loading shows a bar


class ModelLoadError(AtesdError, RuntimeError):
    """A model cannot be loaded. The message names the model, the cause and the fix."""


@dataclass(frozen=True)
class ModelSource:
    """A model to load that is not the student, under the names that the settings of a run have for it.

    Attributes:
        model_name_or_path, torch_dtype: as the fields of a run.
        setting: the field that names the model, for messages.
    """

    model_name_or_path: str
    torch_dtype: str
    setting: str


def setting_of(config: Any) -> str:
    """Returns the field of the configuration that names the model of `config`."""
    return getattr(config, "setting", "model_name_or_path")


def load_model_and_tokenizer(config: ATESDConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model that a run trains, on the CPU and in train mode, and its tokenizer.

    Base weights have dtype `torch_dtype`. With `use_peft` they are frozen, and the model is a `PeftModel` with a
    float32 LoRA adapter, initialised from torch's global random state. The tokenizer pads left and has a pad token.

    Raises:
        ModelLoadError: the folder or Hub id does not exist, the folder is damaged, or a LoRA target does not exist.

    Example:
        >>> from atesd.config import ATESDConfig
        >>> model, tokenizer = load_model_and_tokenizer(ATESDConfig())  # doctest: +SKIP
    """
    tokenizer = load_tokenizer(config)
    return load_model(config), tokenizer


def load_tokenizer(config: ATESDConfig | EvalConfig | ModelSource) -> PreTrainedTokenizerBase:
    """Loads the tokenizer. It pads left and has a pad token. Raises ModelLoadError."""
    from transformers import AutoTokenizer

    with reraise_as_model_load_error(config):
        tokenizer = AutoTokenizer.from_pretrained(model_path(config.model_name_or_path, setting_of(config)))
    check_vocabulary(tokenizer, load_model_config(config), config.model_name_or_path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        # Any token works: padding is masked everywhere.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: Any, model_config: Any, name: str) -> None:
    """Raises ModelLoadError if the tokenizer can write a token that the model has no embedding for.

    A special token that neither the chat template nor the tokenizer itself writes does no harm: Gemma 3 has one.
    """
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if size is not None and i >= size}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    template = str(tokenizer.chat_template)
    harmful = [token for token in beyond if token not in special or token in written or token in template]
    if harmful:
        raise ModelLoadError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, and the model has embeddings for {size}: it "
            f"cannot read {harmful[0]!r} (token {beyond[harmful[0]]}). Use the model's own tokenizer, or resize the "
            "embedding (model.resize_token_embeddings) and save the model"
        )


def load_model_config(config: ATESDConfig | EvalConfig | ModelSource) -> PreTrainedConfig:
    """Loads the model's configuration, without weights. Raises ModelLoadError."""
    from transformers import AutoConfig

    with reraise_as_model_load_error(config):
        return AutoConfig.from_pretrained(model_path(config.model_name_or_path, setting_of(config)))


def context_length(model_config: PreTrainedConfig) -> int:
    """Returns the model's maximum sequence length in tokens. Raises ModelLoadError if `model_config` lacks it."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ModelLoadError(
            f"the configuration of this {model_config.model_type!r} model has no max_position_embeddings, so its "
            "context length is unknown: add the number to the model's config.json"
        )
    return length


def load_base(
    config: ATESDConfig | EvalConfig | ModelSource, attn_implementation: str | None = None, **options: Any
) -> PreTrainedModel:
    """Loads the model as stored, without an adapter. `attn_implementation` defaults to `default_attention`.

    `options` are further arguments of transformers' `from_pretrained`. Raises ModelLoadError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = model_path(config.model_name_or_path, setting_of(config))
    attn_implementation = attn_implementation or default_attention(load_model_config(config))
    with reraise_as_model_load_error(config), bars_of_long_loads():
        model, told = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.torch_dtype),
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    if missing := sorted({*told["missing_keys"], *(entry[0] for entry in told["mismatched_keys"])}):
        raise ModelLoadError(
            f"{setting_of(config)} is {config.model_name_or_path!r}, whose files lack {len(missing)} of its weights, "
            f"such as {missing[0]!r}. transformers would fill them with random numbers. Use a complete model"
        )
    return model


def load_model(config: ATESDConfig) -> PreTrainedModel:
    """Loads the model without its tokenizer; see `load_model_and_tokenizer`."""
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
    """Returns the configured attention, or None for sdpa: not every model supports it, see `default_attention`."""
    return None if config.attn_implementation == "sdpa" else config.attn_implementation


def default_attention(model_config: PreTrainedConfig) -> str | None:
    """Returns "eager" for a model with attention softcapping (Gemma 2), else None: transformers' default, mostly sdpa.

    sdpa has no softcapping. transformers (up to 5.17 at least) picks it for Gemma 2 and silently drops the cap.
    """
    configs = (model_config, model_config.get_text_config())
    capped = any(getattr(part, "attn_logit_softcapping", None) is not None for part in configs)
    return "eager" if capped else None


def check_kernels(config: ATESDConfig) -> None:
    """Raises ModelLoadError if a configured kernel (Liger, flash-attn) cannot run here. Call it before loading."""
    import torch

    gpu = torch.cuda.is_available()
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ModelLoadError("use_liger_kernel is on, and liger-kernel is not installed: pip install 'atesd[gpu]'")
    if config.use_liger_kernel and not gpu:
        raise ModelLoadError("use_liger_kernel is on, and its kernels need a GPU; this machine has none: turn it off")
    if config.attn_implementation in FLASH_PACKAGES and not gpu:
        raise ModelLoadError(
            f"attn_implementation is {config.attn_implementation!r}, which needs a GPU; this machine has none: "
            "set it to 'sdpa'"
        )


def use_liger_kernels(model: Any) -> None:
    """Patches the model in place with Liger's norms, rotary embedding and gated MLP. The loss stays atesd_kernels'.

    Raises:
        ModelLoadError: Liger has no kernels for this model.
    """
    from liger_kernel.transformers import monkey_patch as liger

    kind = model.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ModelLoadError(f"use_liger_kernel is on, and Liger has no kernels for {kind!r}; it has them for {known}")
    liger._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


@contextmanager
def old_name_of_checkpointing() -> Iterator[None]:
    """Context of peft's calls: peft 0.21 asks transformers 5.24 for a property by its old name, which warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def bars_of_long_loads() -> Iterator[None]:
    """Context in which transformers shows its bars only for work of more than `BAR_DELAY` seconds."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{"delay": BAR_DELAY, **kwargs}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextmanager
def reraise_as_model_load_error(config: ATESDConfig | EvalConfig | ModelSource) -> Iterator[None]:
    """Context of a call to transformers: whatever it raises is about the files, and comes in a dozen types."""
    try:
        yield
    except (AtesdError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # its own message advises to run what the pickle says
        raise ModelLoadError(
            f"{setting_of(config)} is {config.model_name_or_path!r}, whose weights are in a pickle (a .bin file) that "
            "is damaged or holds more than tensors, such as code to run. Nothing of it was run. Use weights in "
            "safetensors, or convert the file where you trust it"
        ) from error
    except Exception as error:
        name = config.model_name_or_path
        if not Path(name).expanduser().is_dir() and (advice := unreachable(error)):
            raise ModelLoadError(f"{setting_of(config)} is {name!r}, which is no folder here: {advice}") from error
        raise ModelLoadError(
            f"{setting_of(config)} is {name!r}, which does not load: {first_line(error)}\n"
            f"Use a folder with a model and tokenizer, a reachable Hub id, or {SPECIAL_MODEL!r}."
        ) from error


def model_path(name: str, setting: str = "model_name_or_path") -> str:
    """Returns the folder or Hub id to load `name` from.

    Raises:
        ModelLoadError: a folder that holds no model. The message names `setting`, the field that `name` comes from.
    """
    if name == SPECIAL_MODEL:
        from atesd.models.smollm import smollm2_path

        return str(smollm2_path())
    local = Path(name).expanduser()
    if local.is_dir() and not (local / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in local.iterdir())[:8]) or "nothing"
        advice = f"; it holds: {found}"
        if any((folder / "adapter_config.json").is_file() for folder in (local, local / "adapter")):
            advice = f" but with an adapter: `atesd merge {name} --output_dir FOLDER` makes a model of it; give that"
        elif (local / "model" / "config.json").is_file():
            advice = f": the run's model is in {local / 'model'}"
        raise ModelLoadError(f"{setting} is {name!r}, a folder without config.json{advice}")
    return str(local) if local.is_dir() else name


def check_lora(model_config: PreTrainedConfig, config: ATESDConfig) -> None:
    """Checks that the configured adapter fits the model, without its weights: on torch's meta device.

    Raises:
        ModelLoadError: a name in `lora_target_modules` that the model does not have, or a module without LoRA.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if config.use_peft:
        with torch.device("meta"):
            add_lora(AutoModelForCausalLM.from_config(model_config), config)


def add_lora(model: Any, config: ATESDConfig) -> Any:
    """Returns the `PeftModel` of `model` with the configured LoRA adapter. Raises ModelLoadError, as `check_lora`."""
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    missing = [] if targets == "all-linear" else missing_modules(model, targets)
    if missing:  # peft itself is content with one name that matches
        found = sorted({name.split(".")[-1] for name, m in model.named_modules() if type(m).__name__ == "Linear"})
        raise ModelLoadError(
            f"lora_target_modules is {targets!r}, and the model has no {missing[0]!r}; its linear layers are: "
            f"{', '.join(found)}"
        )
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    try:
        # The adapter is float32 even on a bfloat16 base: bfloat16 would round AdamW's small updates away.
        with old_name_of_checkpointing():
            return get_peft_model(model, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelLoadError(f"lora_target_modules is {targets!r}: {first_line(error)}") from error


def missing_modules(model: Any, targets: str) -> list[str]:
    """Returns the names in `targets`, with commas between, that are no module of `model`."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    names = [name.strip() for name in targets.split(",")]
    return [name for name in names if not any(module.endswith(f".{name}") for module in modules)]
