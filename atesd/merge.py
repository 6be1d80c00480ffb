"""`atesd merge`: writes what a run has trained as one model, which transformers and vLLM load like any other.

An adapter is merged layer by layer in float32, by peft's own merge (models/merging.py), and rounded once. Weights
trained without an adapter are written as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atesd.config.eval_config import EvalConfig
from atesd.config.load import settings_of_run
from atesd.errors import AtesdError, ConfigError, ModelError, StorageError
from atesd.evaluation.model import ADAPTER_FILE, base_model, find_run, load_student, trained_model
from atesd.files import storage_fault
from atesd.hub import check_push, make_repository, push_folder
from atesd.inputs import BASE_FILES, INPUTS, read_inputs, weights_digest
from atesd.models.loading import load_base, load_model_config, model_path, reraise_as_model_load_error
from atesd.models.merging import adapted_modules, base_of, check_mergeable, merged_module
from atesd.models.model_folder import MODEL_FILE, own_empty, write_model
from atesd.resuming import checkpoints_are_gone, finished_after
from atesd.stopping import go_on_command
from atesd.storage.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    newest_whole_checkpoint,
    step_of,
)
from atesd.storage.manifest import MANIFEST, damage
from atesd_kernels.integrations.head import unwrap


@dataclass(frozen=True)
class Merged:
    """What was written: the folder, in words what it holds, its dtype, and what rounding to it has cost.

    `rounding` is the norm of the rounding error over the norm of the adapter's update; None without an adapter.
    """

    folder: Path
    source: str
    dtype: str
    rounding: float | None
    address: str | None

    def __str__(self) -> str:
        lines = [f"model: {self.folder} ({self.source}, in {self.dtype})"]
        if self.rounding is not None and self.rounding > 0.01:
            lines.append(
                f"Rounding to {self.dtype} changed the adapter's update by {self.rounding:.0%} of its norm: "
                "--torch_dtype float32 keeps it"
            )
        return "\n".join(lines + [f"uploaded to {self.address}"] * bool(self.address))


def merge(
    run: str, output_dir: str, model: str | None = None, torch_dtype: str = "auto", push_to_hub: str | None = None
) -> Merged:
    """Writes the model of a run to `output_dir`: safetensors in shards, tokenizer and generation config.

    Args:
        run: a run directory (its newest checkpoint), a checkpoint, RUN_DIR/best, or an adapter's folder.
        output_dir: a folder that is absent or empty.
        model: the base model, where it is no longer what the run names.
        torch_dtype: type of the weights; auto: that of the base model's files, or of the weights a run without LoRA has
            trained.
        push_to_hub: name of the repository to upload the folder to.

    Raises:
        ConfigError: the output folder is not empty, or the run had another base model.
        CheckpointError: the newest checkpoint is damaged.
        ModelError: there is no trained model, or its adapter cannot be merged.
        HubError: the upload failed; the folder is complete.
    """
    if push_to_hub is not None:
        check_push(push_to_hub)
    trained = find_trained(Path(run).expanduser())
    with own_empty(Path(output_dir)) as folder:
        try:
            weights, source, rounding = build(trained, model, torch_dtype)
            if push_to_hub:
                make_repository(push_to_hub)
            write_model(weights, tokenizer_of(trained, model), folder.path)
        except BaseException as error:
            folder.discard()
            if isinstance(error, AtesdError) or (fault := storage_fault(error)) is None:
                raise
            raise StorageError(f"{fault} ({error}): mend that, then run the command again") from error
        folder.discard()  # what is written stays, the lock goes
    address = push_folder(folder.path, push_to_hub) if push_to_hub else None
    return Merged(folder.path, source, str(weights.dtype).removeprefix("torch."), rounding, address)


def find_trained(given: Path) -> Path:
    """Returns the folder of an adapter, of a model, or of a checkpoint whose weights are in its state.

    Raises:
        CheckpointError: the checkpoint to take is damaged.
        ModelError: `given` holds nothing that could be merged.
    """
    holder = next((p for p in (given, given.parent) if (p / MANIFEST).is_file()), None)
    checkpoint = holder or newest_checkpoint(given)
    if checkpoint:
        if holder and (fault := damage(holder)):
            raise CheckpointError(f"{checkpoint} is damaged: {fault}. Give another checkpoint, or the run's adapter/")
        adapter = checkpoint / "adapter"
        return adapter if (adapter / ADAPTER_FILE).is_file() else checkpoint
    if (given / MODEL_FILE).is_file():
        raise ModelError(f"{given} is a model without an adapter: there is nothing to merge, use it as it is")
    for folder, file in ((given, ADAPTER_FILE), (given / "adapter", ADAPTER_FILE), (given / "model", MODEL_FILE)):
        if (folder / file).is_file():
            return folder
    raise ModelError(f"{given} holds no trained model{what_instead(given)}")


def what_instead(given: Path) -> str:
    """The end of a message about a folder without a trained model: what to give, or what to wait for."""
    if (newest := latest_checkpoint(given.parent)) and newest.parent == given:
        return f" of its own, but checkpoints of the run: give {given.parent} or its newest checkpoint, {newest}"
    if trained_model(given) is not None and checkpoints_are_gone(given) is None:
        settings = settings_of_run(given)
        first = min(settings.save_steps, settings.max_steps)
        return f" yet: the run saves its first checkpoint after step {first}. {go_on_command(given)} goes on with it"
    return (
        f": no checkpoint, no adapter/ and no model/. Give a run directory, a checkpoint in its {CHECKPOINTS}/ or an "
        "adapter's folder"
    )


def steps_of(trained: Path) -> str:
    """Says which step the weights are of, if their run has not come to its end."""
    checkpoint = next((p for p in (trained, trained.parent) if (p / MANIFEST).is_file()), None)
    run = find_run(trained)
    if checkpoint is None or run is None or (finished_after(run) or 0) >= step_of(checkpoint):
        return ""
    return f", step {step_of(checkpoint)} of {settings_of_run(run).max_steps}"


def newest_checkpoint(run: Path) -> Path | None:
    """Raises CheckpointError if the newest checkpoint is damaged: an older one is for the user to choose."""
    whole, damaged = newest_whole_checkpoint(run)
    for path, fault in damaged.items():
        instead = f"atesd merge {whole} takes the newest whole one" if whole else "no older one is whole"
        raise CheckpointError(f"{path} is damaged: {fault}. {instead}; {run / 'adapter'} is what a finished run left")
    return whole


def build(trained: Path, model: str | None, dtype: str) -> tuple[Any, str, float | None]:
    """Returns the model to write, where it came from, and what rounding to `dtype` has cost an adapter's update."""
    if (trained / MODEL_FILE).is_file():
        config = EvalConfig(model_name_or_path=str(trained))
        return load_base(with_dtype(config, dtype)), f"the weights in {trained}", None
    config = EvalConfig(model_name_or_path=base_name(trained, model))
    if not (trained / ADAPTER_FILE).is_file():
        config.torch_dtype = "float32"  # what all weights are trained in
        base = load_base(config)
        load_trained(base, trained)
        return (
            base.to(getattr(torch, "float32" if dtype == "auto" else dtype)),
            f"the weights of {trained}{steps_of(trained)}",
            None,
        )
    if model is None:
        check_base(trained, config)
    config = with_dtype(config, dtype)
    wrapped = load_student(config, trained, torch.device("cpu"))
    rounding = merge_layers(wrapped)
    source = f"{trained}{steps_of(trained)}, merged into {config.model_name_or_path}"
    return wrapped.merge_and_unload(), source, rounding


def with_dtype(config: EvalConfig, dtype: str) -> EvalConfig:
    stored = str(getattr(load_model_config(config), "dtype", None) or "float32").removeprefix("torch.")
    config.torch_dtype = stored if dtype == "auto" else dtype
    return config


def base_name(trained: Path, model: str | None) -> str:
    """Returns the base model's name: as given, or as the run or the adapter has it."""
    if model is None and find_run(trained) is None and not (trained / ADAPTER_FILE).is_file():
        raise ModelError(f"{trained} lies in no run directory, so its base model is not known: give --model")
    return base_model(EvalConfig(model_name_or_path=model), trained)


def check_base(trained: Path, config: EvalConfig) -> None:
    """Raises ConfigError if the base model's files are not those that the run has trained on."""
    run = find_run(trained)
    inputs = run / INPUTS if run else None
    if inputs is None or not inputs.is_file():
        return
    before, now = read_inputs(run)[0].get(BASE_FILES), weights_digest(config)
    if before is not None and now is not None and before != now:
        name = config.model_name_or_path
        raise ConfigError(
            f"the files of {name!r} have changed since the run in {run} was started, so the merged model would not be "
            f"what was trained: restore them, or give --model {name} to merge into them as they are"
        )


@torch.no_grad()
def merge_layers(wrapped: Any) -> float:
    """Puts merged layers in place of those that the adapter has wrapped, in the base's dtype.

    Returns the norm of the rounding error over the norm of the update.

    Raises:
        ModelError: peft cannot merge the adapter, or the merged layer would compute something else.
    """
    check_mergeable(wrapped, "It works only as an adapter, beside its base model: atesd eval --adapter takes it.")
    base, error, update = unwrap(wrapped), 0.0, 0.0
    for name, module in adapted_modules(base).items():
        before = dict(base_of(module).named_parameters())
        exact = merged_module(module)
        dtypes = {each: p.dtype for each, p in before.items()}
        for each, p in exact.named_parameters():
            if each in dtypes:
                update += float((p - before[each].to(p.dtype)).square().sum())
                error += float((p.to(dtypes[each]).to(p.dtype) - p).square().sum())
        base.set_submodule(name, exact.to(base.dtype))
    return (error / update) ** 0.5 if update else 0.0


@torch.no_grad()
def load_trained(base: nn.Module, checkpoint: Path) -> None:
    """Copies the weights of a checkpoint of a run without LoRA into `base`.

    Raises:
        CheckpointError: they do not fit.
    """
    weights, parameters = load_checkpoint(checkpoint, verify=False)["trained"], dict(base.named_parameters())
    wrong = [n for n in {**weights, **parameters} if getattr(weights.get(n), "shape", 0) != shape_of(parameters, n)]
    if wrong:
        raise CheckpointError(f"{checkpoint} does not fit the model: {wrong[0]!r} is absent or of another shape")
    for name, p in parameters.items():
        p.copy_(weights[name])


def shape_of(parameters: dict[str, nn.Parameter], name: str) -> Any:
    return parameters[name].shape if name in parameters else None


def tokenizer_of(trained: Path, model: str | None) -> Any:
    """The tokenizer as it stands beside the base model: padding as it is there, not as training wants it."""
    from transformers import AutoTokenizer

    name = str(trained) if (trained / MODEL_FILE).is_file() else base_name(trained, model)
    with reraise_as_model_load_error(EvalConfig(model_name_or_path=name)):
        return AutoTokenizer.from_pretrained(model_path(name))
