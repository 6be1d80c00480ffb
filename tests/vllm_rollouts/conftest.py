"""Tests with the real vLLM, run by `make test-vllm`; elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from atesd.config import ATESDConfig

from .cases import BF16

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def real_config(smollm2_dir: Path, tmp_path: Path) -> Callable[..., ATESDConfig]:
    """A short run of SmolLM2 on gsm_symbolic; keyword arguments change it."""

    def make(**changes) -> ATESDConfig:
        settings = {
            "model_name_or_path": str(smollm2_dir),
            "bf16": BF16,
            "num_train_problems": 8,
            "num_probe_problems": 0,
            "grounding": "none",
            "exposure_policy": "full",
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_prompt_length": 512,
            "max_completion_length": 24,
            "learning_rate": 1e-3,
            "entry_clip": 0.0,
            "save_steps": 1,
            "rollout_engine": "vllm",
        }
        return ATESDConfig(**{**settings, **changes})

    return make
