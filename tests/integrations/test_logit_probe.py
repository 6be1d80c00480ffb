"""A head is checked where it is taken: its logits are the model's own, or it is refused with both numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from atesd_kernels import divergence
from atesd_kernels.integrations import logit_probe
from atesd_kernels.integrations.head import HeadError, hidden_states_and_head
from atesd_kernels.integrations.pairs import collate, pair_divergence

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = [
    {"prompt_ids": [5, 6, 7], "teacher_prompt_ids": [8, 5, 6, 7], "response_ids": [11, 12, 13]},
    {"prompt_ids": [9, 3], "teacher_prompt_ids": [9, 3, 4], "response_ids": [21, 22]},
]


def small(kind, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model.to(dtype)


def copy_with_noise(model):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return other


def dense_pair_divergence(model, teacher):
    total, count = 0.0, 0
    for row in ROWS:
        n = len(row["response_ids"])
        student, other = (
            m(input_ids=torch.tensor([row[p] + row["response_ids"]]), use_cache=False).logits[0, -n - 1 : -1]
            for m, p in ((model, "prompt_ids"), (teacher, "teacher_prompt_ids"))
        )
        total, count = total + divergence(student, other, reduction="sum"), count + n
    return total / count


class DividesItsStates(LlamaForCausalLM):
    """A width multiplier of the output layer under a name of its own."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 3.7
        return out


class CapsThenScales(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 0.5 * 8.0 * torch.tanh(out.logits / 8.0)
        return out


class HidesTokens(LlamaForCausalLM):
    """The last rows of the vocabulary are padding, which the model excludes."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 90:] = -torch.inf
        return out


def custom(cls, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL)
    for name, value in settings.items():
        setattr(config, name, value)
    model = cls(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


HEADS = {
    "multiplies where Granite divides": lambda: small("hyperclovax", logits_scaling=0.125),
    "divides": lambda: small("granite", logits_scaling=8.0),
    "a cap under another name": lambda: small("recurrent_gemma", num_hidden_layers=3, logits_soft_cap=3.0),
    "a scale that no setting names": lambda: custom(DividesItsStates),
    "capped first, then scaled": lambda: custom(CapsThenScales, final_logit_softcapping=8.0, logit_scale=0.5),
    "settings nobody reads": lambda: custom(LlamaForCausalLM, final_logit_softcapping=3.0, logit_scale=9),
    "a decoder inside the backbone": lambda: small("opt", word_embed_proj_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_linear_but_for_a_cap_and_a_scale_gives_the_models_own_loss(head):
    model = HEADS[head]()
    teacher = copy_with_noise(model)
    expected = dense_pair_divergence(model, teacher)
    assert expected > 1e-4
    torch.testing.assert_close(pair_divergence(model, collate(ROWS), teacher), expected, rtol=1e-4, atol=1e-7)


def own_loop(model):
    backbone, head = hidden_states_and_head(model)
    return head.logits(backbone(input_ids=torch.tensor([[1, 2]])).last_hidden_state)


def by_the_trainer(model):
    from atesd_kernels.integrations.hf_trainer import SelfDistillationTrainer

    trainer = SelfDistillationTrainer(model, train_dataset=ROWS, teacher=model)
    return trainer.compute_loss(model, collate(ROWS))


def by_lightning(model):
    lightning = pytest.importorskip("atesd_kernels.integrations.lightning")
    return lightning.SelfDistillationModule(model, model).training_step(collate(ROWS), 0)


CALLERS = {
    "pair_divergence": lambda model: pair_divergence(model, collate(ROWS), model),
    "the Hugging Face trainer": by_the_trainer,
    "Lightning": by_lightning,
    "a loop": own_loop,
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_head_that_is_more_than_a_matrix_is_refused_whoever_takes_it(caller):
    with pytest.raises(HeadError, match="BertLMHeadModel changes its logits after the linear head"):
        CALLERS[caller](small("bert", is_decoder=True))


@pytest.mark.parametrize("caller", CALLERS)
def test_a_head_of_another_width_than_the_hidden_states_is_refused(caller):
    with pytest.raises(HeadError, match="states of ElectraForCausalLM have size 32, and its head takes 24"):
        CALLERS[caller](small("electra", is_decoder=True, embedding_size=24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_refusal_names_both_numbers(dtype):
    model = small("llama", dtype)
    add = torch.zeros(97, dtype=dtype)
    add[41] = 7.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + add)
    with pytest.raises(HeadError, match="its logit of token 41 is ") as refusal:
        hidden_states_and_head(model)
    said = str(refusal.value)
    theirs, ours = (float(said.split(before)[1].split()[0].strip(";")) for before in ("41 is ", "gives at best "))
    assert theirs - ours == pytest.approx(7.0, rel=0.3)


def test_tokens_that_the_model_excludes_and_the_head_does_not_are_refused():
    with pytest.raises(HeadError, match="logit of token 90 is -inf"):
        hidden_states_and_head(custom(HidesTokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gemma2", "hyperclovax", "cohere"])
def test_rounding_of_half_precision_is_not_taken_for_a_difference(kind, dtype):
    model = small(kind, dtype)
    backbone, head = hidden_states_and_head(model)
    with torch.no_grad():
        states = backbone(input_ids=torch.tensor([[4, 5, 6]])).last_hidden_state
        expected = model(input_ids=torch.tensor([[4, 5, 6]])).logits
    torch.testing.assert_close(head.logits(states), expected, rtol=0.02, atol=0.02)


def test_a_forward_under_an_autocast_of_its_own_is_measured_in_that_precision():
    model = small("llama")
    own = model.forward

    def forward(*args, **kwargs):  # as accelerate prepares a model
        with torch.autocast("cpu", torch.bfloat16):
            out = own(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = forward
    assert hidden_states_and_head(model)[1].scale == 1.0


def forwards_of(model) -> list:
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_a_model_is_measured_once_and_again_when_its_head_changes():
    model = small("gemma2", final_logit_softcapping=3.0)
    seen = forwards_of(model)
    for _ in range(3):
        assert hidden_states_and_head(model)[1].softcap == 3.0
    assert len(seen) == 1
    model.config.final_logit_softcapping = 5.0
    assert hidden_states_and_head(model)[1].softcap == 5.0
    assert hidden_states_and_head(copy.deepcopy(model))[1].softcap == 5.0
    assert len(seen) == 3  # a copy is another model, with the same hook
    before = len(logit_probe._MEASURED)
    del model
    import gc

    gc.collect()
    assert len(logit_probe._MEASURED) < before


def test_the_check_leaves_random_numbers_modes_and_gradients_as_they_were():
    model = small("llama", attention_dropout=0.5).train()
    model.model.layers[0].self_attn.eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    modes = {name: module.training for name, module in model.named_modules()}
    hidden_states_and_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters()) and not model.model._forward_hooks


def test_pair_divergence_keeps_the_mode_of_each_module():
    model, teacher = small("llama").train(), small("llama").train()
    teacher.model.norm.eval()
    pair_divergence(model, collate(ROWS), teacher)
    assert teacher.training and not teacher.model.norm.training


@pytest.mark.parametrize(
    ("name", "value"),
    [("lm_head.weight", torch.nan), ("model.layers.0.mlp.up_proj.weight", torch.inf), ("model.norm.weight", torch.nan)],
)
def test_weights_that_are_not_finite_are_named(name, value):
    model = small("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name)[3] = value
    with pytest.raises(HeadError, match=rf"the weights of LlamaForCausalLM hold NaN or infinity: {name}\."):
        hidden_states_and_head(model)


def test_a_bias_of_minus_infinity_excludes_a_token_and_is_no_damage():
    model = small("phi", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.bias[7] = -torch.inf
    assert hidden_states_and_head(model)[1].bias[7] == -torch.inf


def test_a_head_of_zeros_takes_what_the_configuration_says():
    model = small("granite", logits_scaling=4.0)
    nn.init.zeros_(model.lm_head.weight)
    assert hidden_states_and_head(model)[1].scale == 0.25
