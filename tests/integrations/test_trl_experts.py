"""TRL's trainers with `linear_divergence` add and log a mixture of experts' auxiliary loss."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

pytest.importorskip("trl", reason="trl is not installed")

from atesd_kernels.integrations.trl import use_linear_divergence

from .trl_trainers import make_trainer


@pytest.fixture(scope="module")
def experts_path(tiny_model_path, tmp_path_factory):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["sdft", "sdpo", "gkd", "distillation"])
def test_the_auxiliary_loss_is_added_and_logged(kind, experts_path, tmp_path):
    trainer = make_trainer(kind, experts_path, tmp_path, max_steps=1)
    use_linear_divergence(trainer)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["aux_loss"] > 1  # of balanced experts it is 2, the number of experts that a token has
    rest = line["loss"] - 10 * line["aux_loss"]
    assert -0.5 < rest < 3  # the divergence of a nearly uniform model is small
