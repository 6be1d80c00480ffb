"""A tiny model whose distributions depend on the prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sharp_model_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with larger weights: as initialised it answers every prompt with nearly uniform noise."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharp") / "model"
    shutil.copytree(tiny_model_path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    model.save_pretrained(folder)
    return folder
