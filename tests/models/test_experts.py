"""A mixture of experts trains end to end with the default LoRA, its auxiliary loss included."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from atesd.run import Run
from atesd.trainer import Trainer, train
from tests.quiet import quietly

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "Mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "OLMoE": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
}
COEFFICIENT = 0.5


def saved(config, folder, tokenizer_from, **changes) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "asked", "bf16"),
    [("Qwen3-MoE", True, False), ("Mixtral", True, True), ("Mixtral", False, False), ("OLMoE", True, False)],
)
def test_experts_train_with_the_default_lora(family, asked, bf16, tiny_config, tiny_model_path, tmp_path):
    model = saved(EXPERTS[family], tmp_path / "model", tiny_model_path, output_router_logits=asked)
    config = tiny_config(model_name_or_path=model, max_steps=2, bf16=bf16)
    steps = [line for line in lines(quietly(lambda: train(config))) if line["step"] > 0]
    assert len(steps) == 2 and all(line["grad_norm"] > 0 and not line["skipped"] for line in steps)
    assert [line.get("aux_loss", 0) > 0.5 for line in steps] == [asked, asked]
    trained = AutoModelForCausalLM.from_pretrained(model)
    assert trained.config.output_router_logits == asked


def dense_loss(trainer, problems, rollouts, T=1.1):
    """Forward KL and auxiliary loss by the models' own forwards, one sequence at a time."""
    run = trainer.run
    kl = count = 0.0
    for problem, rollout in zip(problems, rollouts, strict=True):
        reply = rollout.response_ids
        read = run.data.prompts.teacher(problem, run.data.references[problem.id], 1.0)
        s = run.student.model(torch.tensor([rollout.prompt_ids + reply])).logits[0, -len(reply) - 1 : -1] / T
        with torch.no_grad(), run.student.model.disable_adapter():
            t = run.student.model(torch.tensor([read + reply])).logits[0, -len(reply) - 1 : -1] / T
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        kl, count = kl + (log_p.exp() * (log_p - log_q)).sum(), count + len(reply)
    size, aux = trainer.run.config.per_device_train_batch_size, 0.0
    for i in range(0, len(rollouts), size):
        rows = [torch.tensor(r.prompt_ids + r.response_ids) for r in rollouts[i : i + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        share = sum(len(r.response_ids) for r in rollouts[i : i + size]) / count
        aux = aux + share * run.student.model(input_ids=ids, attention_mask=mask).aux_loss
    return kl / count, aux


@pytest.mark.parametrize(("family", "checkpointing"), [("Qwen3-MoE", False), ("Mixtral", True), ("OLMoE", False)])
def test_a_step_has_the_gradient_of_the_models_own_divergence_and_auxiliary_loss(
    family, checkpointing, tiny_config, tiny_model_path, tmp_path
):
    changes = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    model = saved(EXPERTS[family], tmp_path / "model", tiny_model_path, **changes)
    config = tiny_config(model_name_or_path=model, exposure_policy="full", entry_clip=None, bf16=False,
                         gradient_checkpointing=checkpointing)  # fmt: skip
    trainer = quietly(lambda: Trainer(Run.build(config)))
    run = trainer.run
    problems = [run.data.problems.train[i] for i in range(4)]
    rollouts = run.rollout.engine.generate([run.data.prompts.student(p) for p in problems])
    with torch.no_grad():
        for name, p in run.student.trained.items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    loss, totals, _ = trainer.distill(problems, rollouts, [1.0] * 4)
    got = {name: p.grad.clone() for name, p in run.student.trained.items()}
    run.student.model.zero_grad()
    kl, aux = dense_loss(trainer, problems, rollouts)
    (kl + COEFFICIENT * aux).backward()
    assert totals.aux_loss() == pytest.approx((aux.item(), COEFFICIENT * aux.item()), rel=1e-4)
    assert loss == pytest.approx((kl + COEFFICIENT * aux).item(), rel=1e-4) and kl > 1e-3
    size = sum(p.grad.square().sum() for p in run.student.trained.values())
    error = sum((got[name] - p.grad).square().sum() for name, p in run.student.trained.items())
    assert float((error / size).sqrt()) < 1e-3 and size > 0
    gates = [p.grad.abs().sum() for name, p in run.student.trained.items() if "mlp.gate" in name]
    assert gates and sum(gates) > 0


def test_the_policy_and_the_clip_see_the_divergence_without_the_auxiliary_loss(tiny_config, tiny_model_path, tmp_path):
    changes = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    model = saved(EXPERTS["Mixtral"], tmp_path / "model", tiny_model_path, **changes)
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(model_name_or_path=model, entry_clip=0.05))))
    seen = []
    observe = trainer.run.exposure.observe
    trainer.run.exposure.observe = lambda t, values: seen.append(values) or observe(t, values)
    metrics, _ = quietly(lambda: trainer.train_step(0))
    assert seen[0]["loss"] == pytest.approx(metrics["loss"] - COEFFICIENT * metrics["aux_loss"], abs=1e-6)
    assert 0 <= metrics["clip_fraction"] < 1
