"""Heads and attentions of other families through a whole step: the loss is the dense one, or the model is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PaliGemmaConfig,
    PhiConfig,
    Qwen3Config,
)
from transformers.integrations import flash_attention

from atesd.errors import ConfigError
from atesd.models import loading as models
from atesd.models.attention.packed import check_packing, use_packed_attention
from atesd.models.batching import hidden_rows, pack
from atesd.models.loading import ModelLoadError
from atesd.rollout import RolloutError
from atesd.run import Run
from atesd.trainer import Trainer
from tests.quiet import quietly

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "softcap on logits and scores, sliding window": Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.0, sliding_window=32
    ),
    "logit scale": CohereConfig(**SIZES, logit_scale=0.25),
    "divided logits": GraniteConfig(**SIZES, logits_scaling=4.0),
    "untied head with a bias": PhiConfig(**SIZES, tie_word_embeddings=False),
    "untied head": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "query and key norms": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=models.default_attention(config))
    with torch.no_grad():
        for p in model.parameters():  # biases and norms that matter, attention that looks around
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.mul_(8)
    return model


def saved(config, folder, tokenizer_from) -> str:
    random_model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


def dense_loss(trainer, problems, rollouts, T=1.1):
    """Forward KL of the model's own logits, one unpacked sequence at a time, all of the model's code included."""
    total, count = 0.0, 0
    for problem, rollout in zip(problems, rollouts, strict=True):
        reply = rollout.response_ids
        read = trainer.run.data.prompts.teacher(problem, trainer.run.data.references[problem.id], 1.0)
        s = trainer.run.student.model(torch.tensor([rollout.prompt_ids + reply])).logits[0, -len(reply) - 1 : -1] / T
        with torch.no_grad(), trainer.run.student.model.disable_adapter():
            t = trainer.run.student.model(torch.tensor([read + reply])).logits[0, -len(reply) - 1 : -1] / T
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        total, count = total + (log_p.exp() * (log_p - log_q)).sum(), count + len(reply)
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_step_is_that_of_the_models_own_dense_logits(family, tiny_config, tiny_model_path, tmp_path):
    model = saved(FAMILIES[family], tmp_path / "model", tiny_model_path)
    config = tiny_config(model_name_or_path=model, exposure_policy="full", entry_clip=None,
                         gradient_checkpointing=family == "query and key norms")  # fmt: skip
    trainer = quietly(lambda: Trainer(Run.build(config)))
    problems = [trainer.run.data.problems.train[i] for i in range(4)]
    rollouts = trainer.run.rollout.engine.generate([trainer.run.data.prompts.student(p) for p in problems])
    with torch.no_grad():  # a student that is not its teacher
        for name, p in trainer.run.student.trained.items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    trainer.run.student.model.double()
    loss, _, _ = trainer.distill(problems, rollouts, [1.0] * 4)
    got = {name: p.grad.clone() for name, p in trainer.run.student.trained.items()}
    trainer.run.student.model.zero_grad()
    expected = dense_loss(trainer, problems, rollouts)
    expected.backward()
    assert expected.item() > 1e-3
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    size = sum(p.grad.square().sum() for p in trainer.run.student.trained.values())
    error = sum((got[name] - p.grad).square().sum() for name, p in trainer.run.student.trained.items())
    assert float((error / size).sqrt()) < 1e-5 and size > 0
    trainer.run.student.model.zero_grad()
    trainer.run.student.model.float()
    metrics, _ = quietly(lambda: trainer.train_step(0))
    assert metrics["grad_norm"] > 0


def test_layers_that_carry_a_state_across_sequences_are_refused_by_name(tiny_config, tiny_model_path, tmp_path):
    config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2)  # fmt: skip
    config.max_position_embeddings = 2048
    model = saved(config, tmp_path / "mamba", tiny_model_path)
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        quietly(lambda: Trainer(Run.build(tiny_config(model_name_or_path=model, use_peft=False))))


def test_an_attention_that_ignores_where_sequences_end_is_noticed():
    model = random_model(FAMILIES["untied head"]).eval()
    use_packed_attention(model)
    check_packing(model)

    def forgets_the_ends(module, args, kwargs):
        kwargs["attention_mask"] = torch.tensor([[[[kwargs["input_ids"].shape[1]]]]], dtype=torch.int32)
        return args, kwargs

    model.model.register_forward_pre_hook(forgets_the_ends, with_kwargs=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM mixes the sequences of a packed row"):
        check_packing(model)


def varlen_by_hand(q, k, v, mask, query_length, is_causal, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
                   softmax_scale=None, **kwargs):  # fmt: skip
    """What flash-attn's variable-length kernel is asked for, by torch: q `(1, L, heads, head_dim)`."""
    assert mask is None and is_causal and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
    out = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        part = [x[:, start:end].transpose(1, 2) for x in (q, k, v)]
        out.append(nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(1, 2))  # fmt: skip
    return torch.cat(out, 1)


def test_the_flash_path_hands_every_sequence_to_the_variable_length_kernel(monkeypatch):
    """The kernel itself cannot run here; what it is given can be checked."""
    calls = []
    monkeypatch.setattr(
        flash_attention, "_flash_attention_forward", lambda *a, **k: calls.append(1) or varlen_by_hand(*a, **k)
    )
    batch = pack([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16, 17], [18]], "cpu")
    states = {}
    for kind in ("sdpa", "flash_attention_2"):
        model = random_model(FAMILIES["query and key norms"]).eval()
        model.config._attn_implementation = kind
        use_packed_attention(model)
        with torch.no_grad():
            states[kind] = hidden_rows(model.model, batch)
    assert len(calls) == 2, "one call a layer, whatever the number of sequences"
    torch.testing.assert_close(states["flash_attention_2"], states["sdpa"], rtol=1e-4, atol=1e-4)


def test_a_sliding_window_of_the_eager_kernel_is_the_models_own():
    model = random_model(Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=1.0, sliding_window=4)).eval()
    ids = list(range(20, 40))
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 9:-1]
        use_packed_attention(model)
        got = hidden_rows(model.model, pack([ids[:10]], [ids[10:]], "cpu"))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        mistral = random_model(MistralConfig(**SIZES, sliding_window=4)).eval()
        use_packed_attention(mistral)
        with pytest.raises(ValueError, match="exceeds the model's sliding window of 4"):
            hidden_rows(mistral.model, pack([ids[:10]], [ids[10:]], "cpu"))


def test_a_model_that_caps_its_attention_scores_is_loaded_with_its_cap(tiny_config, tiny_model_path, tmp_path):
    """sdpa has no cap, and some versions of transformers choose it all the same."""
    capped = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.5)
    config = tiny_config(model_name_or_path=saved(capped, tmp_path / "capped", tiny_model_path))
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        stored = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, attn_implementation="eager")
        expected = stored(ids).logits
        for model in (models.load_base(config), models.load_model(config).eval()):  # an evaluation's, a run's
            assert torch.equal(model(ids).logits, expected)
        for layer in stored.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(stored(ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_only_a_model_with_a_cap_is_asked_to_write_its_attention_out():
    assert models.default_attention(Gemma2Config(**SIZES)) == "eager"
    assert models.default_attention(PaliGemmaConfig(text_config=Gemma2Config(**SIZES))) == "eager"
    assert models.default_attention(Gemma2Config(**SIZES, attn_logit_softcapping=None)) is None
    assert models.default_attention(LlamaConfig(**SIZES)) is None


def test_kernels_that_cannot_run_here_are_refused_before_training(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("atesd.run_parts.load_model", None)  # nothing is loaded
    monkeypatch.setattr("atesd.models.loading.find_spec", lambda name: name)
    with pytest.raises(ModelLoadError, match="use_liger_kernel is on, and its kernels need a GPU"):
        Trainer(Run.build(tiny_config(use_liger_kernel=True)))
    for kind in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(ModelLoadError, match=f"'{kind}', which needs a GPU"):
            Trainer(Run.build(tiny_config(attn_implementation=kind, bf16=True)))
    monkeypatch.setattr("atesd.models.loading.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"liger-kernel is not installed: pip install 'atesd\[gpu\]'"):
        Trainer(Run.build(tiny_config(use_liger_kernel=True)))
    monkeypatch.setattr("atesd.rollout.engine.find_spec", lambda name: None)
    with pytest.raises(RolloutError, match=r"rollout_engine is 'vllm', which is not installed here: pip install"):
        Trainer(Run.build(tiny_config(rollout_engine="vllm")))
    monkeypatch.setattr("atesd.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs flash-attn, .*: pip install .* 'atesd\[flash\]'"):
        tiny_config(attn_implementation="flash_attention_2", bf16=True).validate()
    with pytest.raises(ConfigError, match=r"'flash_attention_3' needs FlashAttention-3, .* from the folder hopper"):
        tiny_config(attn_implementation="flash_attention_3", bf16=True).validate()
    monkeypatch.setattr("atesd.config.checks.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="has no float32 form"):
        tiny_config(attn_implementation="flash_attention_2").validate()


def test_liger_replaces_every_layer_but_the_loss_and_only_for_models_it_knows(tiny_config, monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda model, **kwargs: asked.append(kwargs))
    models.use_liger_kernels(random_model(FAMILIES["untied head"]))
    assert asked == [{"fused_linear_cross_entropy": False, "cross_entropy": False}]
    with pytest.raises(ModelLoadError, match="Liger has no kernels for 'cohere'; it has them for"):
        models.use_liger_kernels(random_model(FAMILIES["logit scale"]))
