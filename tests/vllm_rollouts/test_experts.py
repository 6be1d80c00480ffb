"""A mixture of experts in vLLM: its experts and routers are the student's after a sync."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from atesd.models.loading import load_model_and_tokenizer
from atesd.rollout.vllm import VLLMEngine
from atesd_kernels.integrations.head import unwrap

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "Qwen3-MoE": lambda **sizes: Qwen3MoeConfig(num_experts=4, moe_intermediate_size=32, head_dim=32, **sizes),
    "Mixtral": lambda **sizes: MixtralConfig(num_local_experts=4, **sizes),
}


@pytest.fixture(params=FAMILIES)
def model_dir(request, smollm2_dir, tmp_path):
    """A random model with peaked distributions, so that other experts give other log-probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param](vocab_size=len(tokenizer), **SIZES, **ids))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    model.save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def disturb_experts(model) -> None:
    with torch.no_grad():
        for name, p in unwrap(model).named_parameters():
            if "expert" in name or ".gate.weight" in name:
                p.mul_(1.7)


@torch.no_grad()
def largest_difference(engine, model) -> float:
    """Of the log-probabilities of sampled tokens, between the engine and the model's own forward."""
    found = []
    for rollout in engine.generate([[5, 6, 7], [8, 9, 10, 11]]):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        own = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        sampled = own.gather(1, torch.tensor(rollout.response_ids)[:, None]).flatten()
        found.append((sampled - torch.tensor(rollout.logprobs)).abs().max().item())
    return max(found)


@pytest.mark.model
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "all weights"])
def test_experts_are_the_students_after_each_sync(real_config, colocated, model_dir, use_peft):
    colocated.close()
    config = real_config(
        model_name_or_path=str(model_dir), bf16=False, use_peft=use_peft, temperature=1.0, top_k=0, top_p=1.0,
        vllm_kv_cache_bytes=64 << 20,
    )  # fmt: skip
    model, tokenizer = load_model_and_tokenizer(config)
    model.eval()
    engine = VLLMEngine.from_config(config, model, tokenizer)
    try:
        for _ in range(2):
            engine.sync()
            assert largest_difference(engine, model) < 1e-3
            disturb_experts(model)
            assert largest_difference(engine, model) > 0.05, "the engine still has the old experts"
    finally:
        engine.close()
