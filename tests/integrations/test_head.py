"""Backbone and head, found under every wrapper, or refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, PhiConfig

from atesd_kernels.integrations.head import hidden_states_and_head
from atesd_kernels.integrations.sharded_head import gather_head, reduce_head_gradient

IDS = torch.tensor([[1, 5, 9, 2]])
SMALL = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def small(config_class, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)  # biases and norms that matter
            else:
                p.mul_(5)
    return model


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def logits_from_parts(model, inputs=IDS):
    backbone, head = hidden_states_and_head(model)
    return head.logits(backbone(input_ids=inputs).last_hidden_state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small(Gemma2Config, final_logit_softcapping=3.0, head_dim=8),
        lambda: small(CohereConfig, logit_scale=0.25),
        lambda: small(GraniteConfig, logits_scaling=4.0),
        lambda: small(PhiConfig),
        lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=90, n_embd=16, n_layer=1, n_head=2)).eval(),
    ],
    ids=["softcap", "scale", "divided scale", "bias, untied", "gpt2, tied"],
)
def test_backbone_and_head_give_the_models_own_logits(make):
    model = make()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(logits_from_parts(model), expected, rtol=1e-4, atol=1e-4)
    hidden_states_and_head(model)


def test_leaving_out_the_softcap_would_be_noticed():
    model = small(Gemma2Config, final_logit_softcapping=3.0, head_dim=8)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.config.final_logit_softcapping = None
        assert not torch.allclose(logits_from_parts(model), expected, atol=0.05)


@pytest.mark.parametrize("wrap", [lora, lambda m: torch.compile(lora(m)), nn.DataParallel], ids=["peft", "both", "dp"])
def test_wrappers_are_seen_through(model, wrap):
    wrapped = wrap(model) if wrap is not lora else lora(model, target_modules="all-linear")
    assert hidden_states_and_head(wrapped)[1].weight is model.lm_head.weight


def test_the_backbone_of_a_compiled_model_runs_uncompiled(model):
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    with torch.no_grad():
        logits = logits_from_parts(compiled)
        assert not graphs
        torch.testing.assert_close(logits, compiled(input_ids=IDS).logits)
    assert graphs


def test_the_backbone_of_a_peft_model_runs_its_adapters(model):
    before = logits_from_parts(model)
    adapted = lora(model, target_modules="all-linear")
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    with torch.no_grad():
        torch.testing.assert_close(logits_from_parts(adapted), adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits_from_parts(adapted), before, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits_from_parts(adapted), before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: lora(m, target_modules=["q_proj", "lm_head"]), "carries an adapter"),
        (lambda m: lora(m, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (
            lambda m: get_peft_model(m, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "virtual tokens",
        ),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)) or m, "Sequential, not torch.nn.Linear"),
        (lambda m: m.model, "no output embeddings|no separate backbone"),
    ],
    ids=["lora on the head", "a saved copy of the head", "prompt tuning", "not linear", "no head"],
)
def test_a_head_that_is_not_plainly_linear_is_refused_by_name(model, spoil, message):
    with pytest.raises(ValueError, match=message):
        hidden_states_and_head(spoil(model))


def test_logits_changed_after_the_head_in_an_unannounced_way_are_caught(model):
    hidden_states_and_head(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + torch.arange(300.0) / 100)
    with pytest.raises(ValueError, match="after the linear head"):
        hidden_states_and_head(model)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def calls_of(module) -> list[str]:
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("forward"))
    return seen


@pytest.mark.parametrize("wrap", [lambda m: m, lora], ids=["bare", "peft"])
def test_under_ddp_and_fsdp2_the_wrapper_runs_the_backbone(model, wrap, one_process):
    wrapped = wrap(model)
    expected = logits_from_parts(wrapped)
    ddp = nn.parallel.DistributedDataParallel(wrapped)
    seen = calls_of(ddp)
    torch.testing.assert_close(logits_from_parts(ddp), expected)
    assert seen == ["forward"] and "forward" not in vars(wrapped)
    (logits_from_parts(ddp) * expected.detach()).sum().backward()  # the reducer is ready for it
    sharded = wrap(AutoModelForCausalLM.from_pretrained(model.name_or_path)) if wrap is not lora else model
    for p in sharded.lm_head.parameters():
        p.requires_grad_(False)
    fully_shard(sharded)
    hidden_states_and_head(sharded)  # the first call checks the head, by a forward of its own
    seen = calls_of(sharded)
    torch.testing.assert_close(logits_from_parts(sharded), expected)
    assert seen == ["forward"]
    # one whole head for both, whatever FSDP2 has gathered meanwhile
    first = hidden_states_and_head(sharded)[1].weight
    assert type(first) is torch.Tensor and first.shape == (300, 32) and first.untyped_storage().size() > 0
    assert hidden_states_and_head(sharded)[1].weight is first


def test_a_head_whose_gradient_fsdp2_would_average_is_refused(model, one_process):
    fully_shard(model)
    with pytest.raises(ValueError, match="is trained and sharded by fully_shard"):
        hidden_states_and_head(model)


def test_fsdp1_and_zero3_are_refused_by_name(model):
    model.lm_head.weight.ds_id = 1
    with pytest.raises(ValueError, match="ZeRO-3"):
        hidden_states_and_head(model)
    del model.lm_head.weight.ds_id
    with pytest.raises(ValueError, match="FSDP1"):
        hidden_states_and_head(object.__new__(FullyShardedDataParallel))


def test_a_trained_head_that_fsdp2_shards_is_whole_between_two_calls_and_gets_its_gradient_back(model, one_process):
    """Two micro-batches and a step: the same as without shards, by the loss on hidden states alone."""

    def train(model, before, after):
        backbone, head = before(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for ids in (IDS, IDS.flip(1)):
            head.logits(backbone(input_ids=ids).last_hidden_state).logsumexp(-1).sum().backward()
        after(model)
        optimizer.step()

    plain = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    train(plain, hidden_states_and_head, lambda model: None)
    fully_shard(model)
    gather_head(model)
    spec = hidden_states_and_head(model)[1]
    train(model, hidden_states_and_head, lambda model: reduce_head_gradient(model, average=True))
    assert not torch.allclose(spec.weight, plain.lm_head.weight, atol=1e-3)
    gather_head(model)
    assert hidden_states_and_head(model)[1].weight is spec.weight and spec.weight.grad is None
    torch.testing.assert_close(spec.weight, plain.lm_head.weight)
