"""Tests with the real vLLM, run by `make test-vllm`; elsewhere they are not collected.

One engine in this process serves all tests that only want one: starting it takes longer than what they ask of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atesd.config import ATESDConfig
from atesd.rollout.vllm import VLLMEngine

from .cases import BF16

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def real_config(smollm2_dir: Path, sums: Path, tmp_path: Path) -> Callable[..., ATESDConfig]:
    """A short run of SmolLM2 on short sums; keyword arguments change it."""

    def make(**changes) -> ATESDConfig:
        settings = {
            "model_name_or_path": str(smollm2_dir),
            "dataset_name": str(sums),
            "bf16": BF16,
            "num_probe_problems": 0,
            "grounding": "none",
            "exposure_policy": "full",
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_generations": 2,
            "max_prompt_length": 256,
            "max_completion_length": 24,
            "learning_rate": 1e-3,
            "entry_clip": 0.0,
            "save_steps": 1,
            "rollout_engine": "vllm",
            "vllm_kv_cache_bytes": 256 << 20,
        }
        return ATESDConfig(**{**settings, **changes})

    return make


class Colocated:
    """The engine in this process, started when a test first asks for one of its precision."""

    engine: VLLMEngine | None = None

    def holding(self, model, tokenizer, config: ATESDConfig) -> VLLMEngine:
        """The engine as `config` asks for it, with `model` as its student from the next `sync` on."""
        if self.engine is None or self.dtype != config.bf16:
            self.close()
            self.engine, self.dtype = VLLMEngine.from_config(config, model, tokenizer), config.bf16
        self.engine.model = model
        for name in ("max_completion_length", "temperature", "top_p", "top_k"):
            setattr(self.engine, name, getattr(config, name))
        return self.engine

    def close(self) -> None:
        """At the end, and before a test whose run starts an engine of its own."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


@pytest.fixture(scope="session")
def colocated() -> Iterator[Colocated]:
    shared = Colocated()
    yield shared
    shared.close()
