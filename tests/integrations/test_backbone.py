"""What a model does beside its head reaches the loss: offsets of an activated LoRA, auxiliary losses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    TrainingArguments,
)

from atesd_kernels import divergence
from atesd_kernels.integrations.backbone import aux_loss_of, backbone_forward
from atesd_kernels.integrations.head import HeadError, hidden_states_and_head
from atesd_kernels.integrations.pairs import collate, pair_divergence

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "Qwen3-MoE": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, router_aux_loss_coef=0.3
    ),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.2),
    "OLMoE": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "JetMoE, with a coefficient of another name": JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=4),
}
# different lengths, so that a batch has padding
ROWS = [
    {"prompt_ids": [5, 6, 7], "teacher_prompt_ids": [8, 5, 6, 7], "response_ids": [11, 12, 13]},
    {"prompt_ids": [9, 6], "teacher_prompt_ids": [9, 6, 4], "response_ids": [21, 22]},
]


def build(config, **changes):
    torch.manual_seed(0)
    config = type(config)(**{**config.to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return model


def with_lora(model, **changes):
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"],
                                                "task_type": "CAUSAL_LM", **changes}))  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def gradients(model):
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
             if p.requires_grad}  # fmt: skip
    model.zero_grad()
    return found


def logits_at(model, row, prompt):
    n = len(row["response_ids"])
    return model(input_ids=torch.tensor([row[prompt] + row["response_ids"]]), use_cache=False).logits[0, -n - 1 : -1]


def dense_loss(model):
    """Mean forward KL from the base model, by the models' own forwards, one sequence at a time."""
    total, count = 0.0, 0
    for row in ROWS:
        with torch.no_grad(), model.disable_adapter():
            teacher = logits_at(model, row, "teacher_prompt_ids")
        total = total + divergence(logits_at(model, row, "prompt_ids"), teacher, reduction="sum")
        count += len(row["response_ids"])
    return total / count


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_an_activated_lora_is_trained_as_its_own_forward_would(checkpointing):
    model = with_lora(build(LlamaConfig(**SIZES)), alora_invocation_tokens=[6])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loss = pair_divergence(model, collate(ROWS))
    loss.backward()
    got = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_disable()
    expected = dense_loss(model)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert sum(g.abs().sum() for g in got.values()) > 1e-3
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def test_an_activated_lora_in_a_loop_of_ones_own_gives_the_models_logits():
    model = with_lora(build(LlamaConfig(**SIZES)), alora_invocation_tokens=[6, 7]).eval()
    ids = torch.tensor([[5, 6, 7, 11, 12]])
    backbone, head = hidden_states_and_head(model)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(backbone(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(head.logits(backbone(input_ids=ids).last_hidden_state), expected)


def own_aux_loss(model, batch):
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"])
    return out.aux_loss


@pytest.mark.parametrize("family", EXPERTS)
def test_the_auxiliary_loss_of_experts_is_added_with_the_models_own_coefficient(family):
    silent = build(EXPERTS[family], output_router_logits=False).train()
    model = build(EXPERTS[family], output_router_logits=True).train()
    teacher, batch = build(EXPERTS[family]).eval(), collate(ROWS)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02)
    plain = pair_divergence(silent, batch, teacher)
    total = pair_divergence(model, batch, teacher)
    aux = own_aux_loss(model, batch)
    coefficient = getattr(model.config, "router_aux_loss_coef", None) or model.config.aux_loss_coef
    torch.testing.assert_close(total - plain, coefficient * aux, rtol=1e-3, atol=1e-5)
    total.backward()
    got = gradients(model)
    (pair_divergence(silent, batch, teacher)).backward()
    (coefficient * aux).backward()
    for (name, by_silent), (_, by_aux) in zip(gradients(silent).items(), gradients(model).items(), strict=True):
        torch.testing.assert_close(got[name], by_silent + by_aux, rtol=1e-3, atol=1e-5)
        if "gate.weight" in name:
            assert by_aux.abs().sum() > 0


def test_micro_batches_add_their_share_of_the_auxiliary_loss():
    model = build(EXPERTS["Mixtral"], output_router_logits=True)
    teacher, parts = build(EXPERTS["Mixtral"]), [collate([row]) for row in ROWS]
    whole = sum(pair_divergence(model, part, teacher, num_tokens=5) for part in parts)
    kl = sum(divergence(logits_at(model, row, "prompt_ids"), logits_at(teacher, row, "teacher_prompt_ids").detach(),
                        reduction="sum") for row in ROWS) / 5  # fmt: skip
    aux = sum(own_aux_loss(model, part) * tokens / 5 for part, tokens in zip(parts, (3, 2), strict=True))
    torch.testing.assert_close(whole, kl + 0.2 * aux, rtol=1e-4, atol=1e-6)


def test_a_loop_of_ones_own_finds_the_auxiliary_loss_on_the_output():
    model = build(EXPERTS["OLMoE"], output_router_logits=True)
    backbone, _ = hidden_states_and_head(model)
    out = backbone(input_ids=collate(ROWS)["input_ids"], attention_mask=collate(ROWS)["attention_mask"])
    aux = aux_loss_of(out)
    assert aux.coefficient == 0.01
    torch.testing.assert_close(aux.value, own_aux_loss(model, collate(ROWS)))
    torch.testing.assert_close(aux.weighted(0.5), 0.005 * aux.value)
    with torch.no_grad():
        assert aux_loss_of(backbone(input_ids=collate(ROWS)["input_ids"])) is None


def test_the_hugging_face_trainer_adds_and_logs_the_auxiliary_loss(tmp_path):
    from atesd_kernels.integrations.hf_trainer import SelfDistillationTrainer

    model = with_lora(build(EXPERTS["Mixtral"], output_router_logits=True), target_modules="all-linear")
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=1, logging_steps=1,
                             gradient_accumulation_steps=2, report_to="none", use_cpu=True)  # fmt: skip
    trainer = SelfDistillationTrainer(model, args, train_dataset=ROWS * 2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2 and all(line["loss"] > 0.2 * 0.9 * line["aux_loss"] > 0.1 for line in lines)


def test_lightning_adds_and_logs_the_auxiliary_loss():
    lightning = pytest.importorskip("atesd_kernels.integrations.lightning")
    model = with_lora(build(EXPERTS["Mixtral"], output_router_logits=True))
    module = lightning.SelfDistillationModule(model)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    total = module.training_step(collate(ROWS), 0)
    torch.testing.assert_close(total / 5, pair_divergence(model, collate(ROWS)))
    assert logged["aux_loss"] == pytest.approx(float(own_aux_loss(model, collate(ROWS))), rel=1e-4)


def test_the_auxiliary_loss_goes_through_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build(EXPERTS["Mixtral"], output_router_logits=True)
        expected = pair_divergence(model, collate(ROWS), model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        torch.testing.assert_close(pair_divergence(wrapped, collate(ROWS), model), expected)
    finally:
        torch.distributed.destroy_process_group()


REFUSED = {
    "no coefficient": (
        lambda: build(LlamaConfig(**SIZES), output_router_logits=True),
        "has no router_aux_loss_coef",
    ),
    "a model without experts": (
        lambda: build(LlamaConfig(**SIZES), output_router_logits=True, router_aux_loss_coef=0.1),
        "which its forward does not return: set output_router_logits to false",
    ),
    "a loss on the logits": (
        lambda: build(
            BambaConfig(**SIZES, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, attn_layer_indices=[0]),
            z_loss_coefficient=0.1,
        ),
        "z_loss_coefficient is 0.1",
    ),
    "adapters weighed by a second forward": (
        lambda: with_xlora(build(LlamaConfig(**SIZES))),
        "X-LoRA runs the model twice",
    ),
}


def with_xlora(model):
    wrapped = with_lora(model)
    wrapped.peft_config["default"].peft_type = "XLORA"
    return wrapped


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(what):
    make, message = REFUSED[what]
    with pytest.raises(HeadError, match=message):
        model = make()
        hidden_states_and_head(model)[0](input_ids=collate(ROWS)["input_ids"])


def test_an_auxiliary_loss_without_gradient_under_reentrant_checkpointing_is_refused():
    model = build(EXPERTS["Mixtral"], output_router_logits=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(HeadError, match="'use_reentrant': False"):
        pair_divergence(model, collate(ROWS), build(EXPERTS["Mixtral"]))


def test_the_backbone_of_a_plain_model_is_the_module_itself():
    model = build(LlamaConfig(**SIZES))
    assert backbone_forward(model) is model.model and backbone_forward(with_lora(model)) is model.model


def with_two_loras(model):
    model = with_lora(model)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.second" in name:
                p.normal_(std=0.3)
    return model.eval()


IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
ROW_ADAPTERS = ["default", "second", "__base__"]


@pytest.mark.parametrize(
    ("config", "changes"),
    [(LlamaConfig(**SIZES), {}), (EXPERTS["Mixtral"], {"output_router_logits": True})],
    ids=["dense", "experts with an auxiliary loss"],
)
def test_each_row_gets_the_adapter_that_it_names(config, changes):
    model = with_two_loras(build(config, **changes))
    backbone, head = hidden_states_and_head(model)
    expected = model(input_ids=IDS, adapter_names=ROW_ADAPTERS).logits
    got = head.logits(backbone(input_ids=IDS, adapter_names=ROW_ADAPTERS).last_hidden_state)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert min((got[i] - got[j]).abs().max() for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-2
    plain = head.logits(backbone(input_ids=IDS).last_hidden_state)
    torch.testing.assert_close(plain, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_adapter_names_that_peft_refuses_are_refused():
    model = with_two_loras(build(LlamaConfig(**SIZES)))
    backbone, _ = hidden_states_and_head(model)
    with pytest.raises(ValueError, match=r"non-existing adapter.*third"):
        backbone(input_ids=IDS, adapter_names=["third"] * 3)
    model.train()
    with pytest.raises(ValueError, match=r"adapter_names.*training mode"):
        backbone(input_ids=IDS, adapter_names=ROW_ADAPTERS)
