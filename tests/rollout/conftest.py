"""An engine for the stand-in server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atesd.rollout.vllm_server import VLLMServerEngine

STOP = 2


@pytest.fixture
def connect(server, tiny_model_path, tmp_path, monkeypatch) -> Callable[..., VLLMServerEngine]:
    monkeypatch.setattr(VLLMServerEngine, "pause", 0.0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))

    def make(**settings):
        settings = {"stop_ids": [STOP], "context_length": 32, "vocab_size": 300, "max_completion_length": 8, **settings}
        url = f"http://127.0.0.1:{server.server_port}"
        return VLLMServerEngine(model, url, folder=tmp_path / "weights", dtype=torch.bfloat16, **settings)

    return make
