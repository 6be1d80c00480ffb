"""Checks that an adapter's weights belong to a model, from their names and shapes alone, before weights are loaded.

peft warns where an adapter lacks a layer of the model, and says nothing where it has one that the model lacks.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atesd.config.eval_config import EvalConfig
from atesd.errors import first_line
from atesd.models.loading import ModelLoadError, load_model_config

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
Shapes = dict[str, tuple[int, ...]]


def check_adapter_fits(config: EvalConfig, adapter: Path) -> None:
    """Checks the adapter in folder `adapter` against the configured model, on torch's meta device.

    Adapters that cannot be built there (SHiRA, BOFT) are left to the loading.

    Raises:
        ModelLoadError: other target modules, layers or shapes than the model has.
    """
    problem = adapter_problem(load_model_config(config), adapter)
    if problem:
        raise ModelLoadError(
            f"the adapter in {adapter} does not fit the model {config.model_name_or_path!r}: {problem}. Give the model "
            "that it was trained on (--model), or another --adapter"
        )


def adapter_problem(model_config: Any, adapter: Path) -> str | None:
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    settings = PeftConfig.from_pretrained(str(adapter))
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the loading shows them
            base = AutoModelForCausalLM.from_config(model_config)
            modules = {name for name, _ in base.named_modules()}
            embeddings = embedding_names(base)
            model = get_peft_model(base, settings)
            expected = shapes_of(get_peft_model_state_dict(model, save_embedding_layers=False))
    except ValueError as error:
        return first_line(error) if "module" in str(error) else None
    except (RuntimeError, TypeError, AttributeError, KeyError, OSError):
        return None
    found = stored_shapes(adapter / WEIGHTS)
    return None if found is None else difference(expected, found, modules, embeddings)


def difference(expected: Shapes, found: Shapes, modules: set[str], embeddings: set[str]) -> str | None:
    """Returns how the weights found differ from those that the model's adapter would have; None if they do not.

    Compares the modules that they belong to, not every name: some tuners hold more in memory than they store.
    """
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            return f"its {name.removeprefix(_PREFIX)!r} is {found[name]}, where the model needs {expected[name]}"
    wanted, stored = ({module_of(name, modules): name for name in names} for names in (expected, found))
    for module, name in stored.items():
        if module not in wanted and module not in embeddings:
            return f"the model has no place for its {name.removeprefix(_PREFIX)!r}"
    missing = next((module for module in wanted if module not in stored), None)
    return f"it has no weights for the model's {missing!r}" if missing else None


def module_of(name: str, modules: set[str]) -> str:
    """Returns the innermost of `modules` that a weight belongs to, "" for the whole model."""
    name = name.removeprefix(_PREFIX)
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def embedding_names(base: nn.Module) -> set[str]:
    """Returns the names of the input and output embeddings: peft stores both if their size has changed."""
    own = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {name for name, module in base.named_modules() if any(module is each for each in own)}


def shapes_of(weights: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def stored_shapes(file: Path) -> Shapes | None:
    """Returns the shapes in a safetensors file, by name, without reading its tensors; None if there is no such file."""
    from safetensors import safe_open

    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
