"""A run small enough for a test: the tiny random Llama on a few worked sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atesd.config import ATESDConfig


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """A model this small is slower on two threads, and much slower on two threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(tiny_model_path: Path, sums: Path, tmp_path: Path) -> Callable[..., ATESDConfig]:
    """Settings of a run of a few steps; keyword arguments change them."""

    def make(**changes) -> ATESDConfig:
        settings = {
            "model_name_or_path": str(tiny_model_path),
            "dataset_name": str(sums),
            "num_probe_problems": 2,
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_prompt_length": 512,
            "max_completion_length": 12,
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-3,
            "hold_window": 1,
            "lookahead": 1,
            "policy_batch_size": 2,
            "save_steps": 2,
        }
        return ATESDConfig(**{**settings, **changes})

    return make
