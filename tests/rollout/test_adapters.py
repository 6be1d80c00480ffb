"""Decoding with every adapter that peft has: the packed model samples what the model itself would, and the weights that
other engines load are those of a model with the same logits, or the adapter is refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)  # fmt: skip

from atesd.errors import ModelError
from atesd.models import merging
from atesd.models.attention.packed import use_packed_attention
from atesd.models.merging import merge_problems
from atesd.rollout.decoding import layers
from atesd.rollout.decoding.layers import PackedLinear, decoding_model, packable_layers
from atesd.rollout.hf import HFEngine
from atesd.rollout.weights import check_merged, check_plain_lora, merged_weights
from atesd_kernels.integrations.head import unwrap

LINEAR = ["q_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 20, 30, 6], [8, 9, 10, 40, 50, 60]])
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
# What a tuner needs beside target_modules, on layers this small
SETTINGS: dict[PeftType, dict[str, Any]] = {
    PeftType.ADALORA: {"total_step": 10},
    PeftType.BEFT: {"target_modules": ["q_proj"]},  # it trains a bias
    PeftType.C3A: {"block_size": 8},
    PeftType.IA3: {"feedforward_modules": ["down_proj"]},
    PeftType.MISS: {"r": 4},
    PeftType.OFT: {"oft_block_size": 8},
    PeftType.ROAD: {"group_size": 8},
    PeftType.SHIRA: {"r": 4},
    PeftType.TRAINABLE_TOKENS: {"target_modules": ["embed_tokens"], "token_indices": [5, 6]},
    PeftType.VBLORA: {"vector_length": 8, "num_vectors": 16},
    PeftType.WAVEFT: {"n_frequency": 16},
}
NEEDS_A_PACKAGE = {PeftType.ADAMSS}
IN_FRONT = {
    PeftType.PROMPT_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING, PeftType.CPT,
    PeftType.CARTRIDGE,
}  # fmt: skip
AROUND = {PeftType.ADAPTION_PROMPT, PeftType.POLY, PeftType.SHADOW, PeftType.XLORA}
IN_LAYERS = sorted(set(PEFT_TYPE_TO_CONFIG_MAPPING) - IN_FRONT - AROUND - NEEDS_A_PACKAGE)
LORA: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "bias, where the layer has one": {"lora_bias": True, "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "new tokens": {"trainable_token_indices": [5, 6]},
    "a trained norm": {"modules_to_save": ["norm"]},
    "KaSA": {"kasa_config": KasaConfig()},
    "VeLoRA": {"velora_config": peft.VeloraConfig()},
    "MonteCLoRA": {"monteclora_config": peft.MontecloraConfig()},
}


def bare(config=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(attention_bias=True, **SMALL), dtype=dtype)
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.3)
    use_packed_attention(model)
    return model.eval()


def adapted(model, config):
    """`model` under a new adapter whose weights are not at their start, where most adapters change nothing."""
    model, generator = get_peft_model(model, config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def with_tuner(kind, **changes):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    return config(**{"task_type": "CAUSAL_LM", "target_modules": LINEAR, **SETTINGS.get(kind, {}), **changes})


@torch.no_grad()
def logprobs(model, ids=IDS):
    return model(input_ids=ids).logits.log_softmax(-1)


def assert_decodes_as_it_computes(model):
    with decoding_model(model, torch.float32, packable_layers(model, merge_problems(model))) as twin:
        assert any(isinstance(module, PackedLinear) for module in twin.modules()) or not layers.onednn_packs(
            torch.float32
        )
        torch.testing.assert_close(logprobs(twin), logprobs(model), rtol=1e-3, atol=1e-3)


def assert_merges_into_its_logits(model):
    kept = {name: p.clone() for name, p in model.named_parameters()}
    check_merged(model)
    other = from_checkpoint(dict(merged_weights(model, torch.float32)), unwrap(model).config)
    torch.testing.assert_close(logprobs(other), logprobs(model), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters()), "the model itself has changed"


def from_checkpoint(weights, config):
    """The model that transformers loads from a checkpoint's tensors; it must know all of their names."""
    cls = type(AutoModelForCausalLM.from_config(config))
    found, report = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    use_packed_attention(found)
    return found.eval()


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_every_tuner_of_peft_decodes_as_it_computes_and_merges_or_is_refused_by_name(kind):
    before = logprobs(bare())
    model = adapted(bare(), with_tuner(kind))
    assert (logprobs(model) - before).abs().max() > 0.01, "the adapter does nothing, so the test would show nothing"
    assert_decodes_as_it_computes(model)
    if kind is PeftType.LILY:
        with pytest.raises(ModelError, match=r"the LILY adapter on 'model\.layers\.0\.self_attn\.q_proj' cannot be"):
            check_merged(model)
    else:
        assert_merges_into_its_logits(model)


@pytest.mark.parametrize("options", LORA.values(), ids=list(LORA))
def test_every_variant_of_lora_decodes_as_it_computes_and_merges(options):
    model = adapted(bare(), with_tuner(PeftType.LORA, **options))
    assert_decodes_as_it_computes(model)
    assert_merges_into_its_logits(model)


def test_two_adapters_at_once_decode_and_merge_as_one():
    model = adapted(bare(), with_tuner(PeftType.LORA))
    model.add_adapter("second", with_tuner(PeftType.LORA, use_dora=True, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model = model.eval()
    assert_decodes_as_it_computes(model)
    assert_merges_into_its_logits(model)


def test_an_adapter_that_is_switched_off_is_neither_decoded_nor_merged():
    model = adapted(bare(), with_tuner(PeftType.LORA))
    with model.disable_adapter():
        assert_decodes_as_it_computes(model)
        assert_merges_into_its_logits(model)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once():
    model = adapted(bare(dtype=torch.bfloat16), with_tuner(PeftType.LORA))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.weight.float() + layer.get_delta_weight("default")
    merged = dict(merged_weights(model, torch.bfloat16))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, exact.bfloat16())


def test_a_bias_of_lora_that_no_layer_can_hold_is_decoded_and_not_merged():
    model = adapted(bare(), with_tuner(PeftType.LORA, lora_bias=True, target_modules=["down_proj"]))
    assert_decodes_as_it_computes(model)
    with pytest.raises(ModelError, match=r"down_proj' cannot be merged .*no bias.* Set rollout_engine to 'hf'"):
        check_merged(model)


@pytest.mark.parametrize("fault", ["forgets a factor", "raises"])
def test_a_layer_whose_merge_is_wrong_keeps_its_own_forward_and_is_not_sent_to_another_engine(monkeypatch, fault):
    def delta(self, adapter):
        if fault == "raises":
            raise NotImplementedError("no delta here")
        return self.lora_B[adapter].weight @ self.lora_A[adapter].weight

    model = get_peft_model(bare(), with_tuner(PeftType.LORA, lora_alpha=32)).eval()  # B is zero: both agree by chance
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", delta)
    names = packable_layers(model, merge_problems(model))
    assert names and not {name for name in names if name.endswith(("q_proj", "down_proj"))}
    assert_decodes_as_it_computes(model)
    says = {"forgets a factor": "output differs by", "raises": "no delta here"}[fault]
    with pytest.raises(ModelError, match=rf"q_proj' cannot be merged into the model: .*{says}"):
        check_merged(model)


def test_an_adapter_on_an_embedding_tied_to_the_head_is_refused_for_merging():
    tied = LlamaConfig(**{**SMALL, "tie_word_embeddings": True})
    model = adapted(bare(tied), with_tuner(PeftType.LORA, target_modules=["embed_tokens"]))
    assert_decodes_as_it_computes(model)
    with pytest.raises(ModelError, match=r"embed_tokens' cannot be merged .*'lm_head.weight' has the same weight"):
        check_merged(model)


MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
EXPERTS = [Qwen3MoeConfig(**SMALL, **MOE), MixtralConfig(**SMALL, **MOE), OlmoeConfig(**SMALL, **MOE)]


CORRECTED = Glm4MoeConfig(**SMALL, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                          first_k_dense_replace=1)  # fmt: skip


@pytest.mark.parametrize("config", [*EXPERTS, CORRECTED], ids=lambda config: config.model_type)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "LoRA"])
def test_engines_are_sent_the_tensors_that_a_checkpoint_of_the_model_holds(config, wrapped, tmp_path):
    model = bare(config)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(0.5)  # a router's correction bias is a buffer, and starts as zeros
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    student = get_peft_model(model, with_tuner(PeftType.LORA, target_modules=["q_proj"])) if wrapped else model
    sent = dict(merged_weights(student, torch.float32))
    assert sent.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("config", EXPERTS, ids=lambda config: config.model_type)
def test_experts_under_target_parameters_decode_as_they_compute_and_merge(config, parameters):
    options = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in parameters]}
    model = adapted(bare(config), with_tuner(PeftType.LORA, **options))
    assert_decodes_as_it_computes(model)
    assert_merges_into_its_logits(model)


@pytest.fixture
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def greedy(model, prompt, length):
    ids = torch.tensor([prompt])
    for _ in range(length):
        ids = torch.cat([ids, logprobs(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "config",
    [
        with_tuner(PeftType.LORA, use_dora=True),
        with_tuner(PeftType.LORA, lora_bias=True, target_modules=LINEAR),
        with_tuner(PeftType.VERA),
        with_tuner(PeftType.HRA),
    ],
    ids=["DoRA", "bias", "VeRA", "HRA"],
)
def test_the_engine_samples_the_tokens_that_the_model_itself_prefers(config, tokenizer):
    model = adapted(bare(), config)
    engine = HFEngine(model, tokenizer, max_completion_length=6, top_k=1)
    prompts = [[5, 6, 7], [20, 21, 22, 23]]
    for prompt, rollout in zip(prompts, engine.generate(prompts), strict=True):
        assert rollout.response_ids == greedy(model, prompt, 6)[: len(rollout.response_ids)]


def test_layers_are_compared_with_their_merge_at_the_start_and_not_at_every_rollout(tokenizer, monkeypatch):
    asked, real = [], merging.merge_problem
    monkeypatch.setattr(merging, "merge_problem", lambda module: asked.append(module) or real(module))
    engine = HFEngine(adapted(bare(), with_tuner(PeftType.LORA)), tokenizer, max_completion_length=2)
    assert len(asked) == 4  # two layers, two adapters each
    for _ in range(2):
        engine.generate([[5, 6, 7]])
    assert len(asked) == 4


def test_an_adapter_that_waits_for_certain_tokens_is_refused_by_every_engine(tokenizer):
    model = adapted(bare(), with_tuner(PeftType.LORA, alora_invocation_tokens=[6]))
    with pytest.raises(ModelError, match=r"LORA adapter changes a token by what other tokens are \(alora_invocation"):
        HFEngine(model, tokenizer, max_completion_length=2)
    with pytest.raises(ModelError, match=r"q_proj' cannot be merged .*aLoRA does not support merging"):
        check_merged(model)
    with pytest.raises(ModelError, match="is ALoraLinearVariant, and a vLLM server loads plain LoRA"):
        check_plain_lora(model)


def test_an_adapter_that_looks_at_the_other_tokens_is_refused_for_decoding(tokenizer):
    model = get_peft_model(bare(), with_tuner(PeftType.LILY))  # it mixes its experts by the mean over all tokens
    with pytest.raises(ModelError, match=r"LILY adapter changes a token by what other tokens are \(model.layers.0"):
        HFEngine(model, tokenizer, max_completion_length=2)


class Bypass(torch.nn.Module):
    """What a tuner with a forward of its own comes to: logits that the base model's layers alone do not give."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits * 1.5
        return out

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_an_adapter_that_works_around_the_layers_is_refused_for_decoding(tokenizer):
    model = adapted(bare(), with_tuner(PeftType.LORA))
    model.base_model.forward = Bypass(model.base_model.model).forward
    with pytest.raises(ModelError, match=r"the LORA adapter acts outside the model's layers \(its logits differ by"):
        HFEngine(model, tokenizer, max_completion_length=2)


def test_an_adapter_that_needs_more_than_tokens_is_refused_for_decoding(tokenizer):
    model = get_peft_model(bare(), with_tuner(PeftType.POLY, n_tasks=2))
    with pytest.raises(ModelError, match=r"the POLY adapter acts outside the model's layers .*task_ids"):
        HFEngine(model, tokenizer, max_completion_length=2)


@pytest.mark.parametrize("kind", [PeftType.ADAPTION_PROMPT, PeftType.SHADOW])
def test_a_tuner_without_a_merge_is_refused_for_merging(kind):
    options = {PeftType.ADAPTION_PROMPT: {"adapter_len": 4, "adapter_layers": 1}, PeftType.SHADOW: {}}[kind]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)
    with pytest.raises(ModelError, match=f"the {kind.value} adapter cannot be merged"):
        check_merged(get_peft_model(bare(LlamaConfig(**SMALL)), config))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (with_tuner(PeftType.LORA), None),
        (with_tuner(PeftType.LORA, use_rslora=True), None),
        (with_tuner(PeftType.LORA, use_dora=True), "DoraLinearVariant"),
        (with_tuner(PeftType.LORA, lora_bias=True), "LoRA with a bias"),
        (with_tuner(PeftType.LORA, kasa_config=KasaConfig()), "KasaLinearVariant"),
        (with_tuner(PeftType.LORA, target_modules=["embed_tokens"]), "Embedding"),
        (with_tuner(PeftType.LORA, modules_to_save=["norm"]), "ModulesToSaveWrapper"),
        (with_tuner(PeftType.IA3), "ia3"),
        (with_tuner(PeftType.ADALORA), "adalora"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_vllm_server_is_sent_plain_lora_only(config, what):
    model = get_peft_model(bare(), config)
    if what is None:
        check_plain_lora(model)
        return
    with pytest.raises(ModelError, match=rf"is .*{what}.* set vllm_server_weights to 'merged'"):
        check_plain_lora(model)
