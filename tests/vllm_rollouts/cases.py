"""Prompts, a change of weights, and the yardstick both vLLM test files measure log-probabilities with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import pack
from atesd.models.precision import has_fast_bf16
from atesd.models.scoring import token_logprobs
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap

# On a processor without bfloat16 products vLLM's take seconds each, and everything here is float32.
BF16 = has_fast_bf16()
QUESTIONS = ("What is 12 plus 30?", "Name a colour.", "Count from one to five.", "Why is the sky blue?")


def chat_prompts(tokenizer) -> list[list[int]]:
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]


def trainers_logprobs(model, rollouts, bf16: bool) -> torch.Tensor:
    use_packed_attention(unwrap(model))
    backbone, head = hidden_states_and_head(model)
    batch = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return token_logprobs(backbone, head, batch).float()


def noise_and_difference(model, rollouts) -> tuple[float, float]:
    """What rounding explains, and how far the engine is from the trainer in the same precision. In bf16 the noise is
    the trainer's own, against its fp32; in fp32 a few times what two orders of summation differ by."""
    engine = torch.tensor([p for r in rollouts for p in r.logprobs])
    trainer = trainers_logprobs(model, rollouts, BF16)
    noise = (trainer - trainers_logprobs(model, rollouts, False)).abs().mean().item() if BF16 else 5e-5
    return noise, (engine - trainer).abs().mean().item()


def disturb(model) -> None:
    """A change to every trained matrix, large enough to be another distribution."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.dim() == 2:
                scale = 0.04 if "lora_B" in name else 0.1 * p.std()  # B starts as zeros
                p.add_(scale * torch.randn_like(p))


def check_follows_at_a_sync_alone(engine, model, prompts: list[list[int]]) -> None:
    """The engine's log-probabilities are the student's after a sync, and those of its old weights without one."""
    engine.sync()
    noise, difference = noise_and_difference(model, engine.generate(prompts))
    assert difference < 3 * noise
    disturb(model)
    noise, difference = noise_and_difference(model, engine.generate(prompts))
    assert difference > 10 * noise, "without a sync the engine still samples from the old weights"
    engine.sync()
    noise, difference = noise_and_difference(model, engine.generate(prompts))
    assert difference < 3 * noise


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
