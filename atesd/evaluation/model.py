"""Finds and loads the weights that an evaluation uses: the base model, and optionally the adapter of a run.

models/loading.py makes the model that a run trains. This file starts from paths, and checks them before it loads
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atesd.config import CONFIG_FILE
from atesd.config.eval_config import EvalConfig
from atesd.config.load import read_own
from atesd.errors import first_line
from atesd.evaluation.files import EvalError
from atesd.models.loading import ModelLoadError, load_base, old_name_of_checkpointing
from atesd.storage.checkpoint import latest_checkpoint
from atesd.storage.manifest import MANIFEST, damage

ADAPTER_FILE = "adapter_config.json"


def find_adapter(path: str) -> Path:
    """Returns the adapter folder: `path` itself, that of a checkpoint, or that of a run's latest checkpoint."""
    given = Path(path).expanduser()
    newest = latest_checkpoint(given)
    for folder in (given, given / "adapter", *([newest / "adapter"] if newest else [])):
        if (folder / ADAPTER_FILE).is_file():
            check_checkpoint(folder.parent)
            return folder
    if (given / "model" / "config.json").is_file():
        raise EvalError(f"adapter is {path!r}, a run without LoRA: give --model {given / 'model'} instead")
    if (given / "config.json").is_file():
        raise EvalError(f"adapter is {path!r}, which is a whole model and no adapter: give --model {path} instead")
    raise EvalError(f"adapter is {path!r}, which holds no {ADAPTER_FILE}: give a run directory or an adapter folder")


def check_checkpoint(folder: Path) -> None:
    """Raises EvalError if `folder` is a checkpoint that has changed since it was written."""
    if (folder / MANIFEST).is_file() and (fault := damage(folder)):
        raise EvalError(f"the checkpoint {folder} is damaged: {fault}. Give another checkpoint or adapter")


def find_run(folder: Path) -> Path | None:
    """Returns the run directory that is or contains `folder` (up to 3 levels up); None without one."""
    return next((p for p in (folder, *folder.resolve().parents[:3]) if trained_model(p) is not None), None)


def trained_model(run: Path) -> str | None:
    """Returns the model name in the config of the run in `run`; None if `run` is not a run directory."""
    file = run / CONFIG_FILE
    return read_own(file).get("model_name_or_path") if file.is_file() else None


def base_model(config: EvalConfig, adapter: Path | None) -> str:
    """Returns the model name from `config`, else from the adapter's run, else from the adapter's own config."""
    if config.model_name_or_path is not None:
        return config.model_name_or_path
    run = find_run(adapter)
    if run is not None:
        return trained_model(run)
    try:
        named = dict(json.loads((adapter / ADAPTER_FILE).read_bytes())).get("base_model_name_or_path")
    except (ValueError, TypeError) as error:
        raise EvalError(f"{adapter / ADAPTER_FILE} is damaged ({first_line(error)}): restore it from a copy") from error
    if not named:
        raise EvalError(f"the adapter in {adapter} does not name its base model: give --model")
    return named


def load_student(config: EvalConfig, adapter: Path | None, device: torch.device) -> nn.Module:
    """Loads the model to evaluate onto `device`, in eval mode; a `PeftModel` if there is an adapter."""
    model: Any = load_base(config)
    if adapter is not None:
        from peft import PeftModel

        try:
            with old_name_of_checkpointing():
                model = PeftModel.from_pretrained(model, str(adapter))
        except Exception as error:  # its files may be damaged in any way
            raise ModelLoadError(
                f"the adapter in {adapter} does not fit the model {config.model_name_or_path!r}: {first_line(error)}"
            ) from error
    return model.to(device).eval()
