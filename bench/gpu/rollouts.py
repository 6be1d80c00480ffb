"""Stage 7: rollouts by the Hugging Face engine, by transformers' own `generate`, and by vLLM where it is installed.

A batch of 32 prompts, 128 new tokens each: a model with Qwen3-1.7B's sizes and random weights, the recipe's sampling,
no token that ends a response. The model alone first, then with the LoRA the recipe trains, which is how a run decodes.
Each engine decodes the same lengths twice: the first time a library may prepare what depends on the length. The bytes a
token reads set the floor that `atesd scaling` predicts for one H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from atesd.config import ATESDConfig
from atesd.planning.gpu_specs import H100
from atesd.planning.memory_plan import Layout
from atesd.planning.model_shape import model_shape
from atesd.planning.time_plan import plan_time
from atesd.rollout import Sampling, hf
from atesd.rollout.hf import HFEngine
from bench import timing
from bench.gpu.clock import extra_bytes, first_line
from bench.gpu.stage import Stage
from bench.gpu.step import FULL, TOY, add_trained_lora, qwen, random_model, step_settings
from bench.machine import markdown

ENGINE, GENERATE = "atesd's HF engine", "transformers' generate"
ROUNDS = 2
LEAST_LEFT = 8.0  # seconds without which the second kind of model is left out
NO_END = -1  # a token id that no response holds


class Sizes(NamedTuple):
    batch: int
    prompt: int  # the longest
    new_tokens: int
    warm_up: int  # new tokens of the call that comes first


REAL, SMALL = Sizes(32, 128, 128, 8), Sizes(4, 12, 4, 2)


def run(stage: Stage) -> None:
    if stage.dry:
        torch.set_num_threads(1)  # toy products are faster so, beside other work
    sizes = SMALL if stage.dry else REAL
    settings = replace(step_settings(TOY if stage.dry else FULL), max_completion_length=sizes.new_tokens)
    model_config = qwen(stage.dry)
    sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    stage.keep(sizes=sizes._asdict(), sampling=sampling, rows={}, failed={})
    stage.keep(predicted=predicted_seconds(model_config, settings, sizes))
    if find_spec("vllm") is None:
        stage.leave_out("vLLM", "vllm is not installed")
    else:
        stage.leave_out("vLLM", "it reads a model from a folder, and there is none here")
    model = random_model(model_config, stage.device).eval()
    stage.say("the model is there")
    prompts = some_prompts(model_config.vocab_size, sizes)
    rows: dict[str, dict] = {}
    failed: dict[str, str] = {}
    for kind in ("the model alone", "with LoRA"):
        try:
            if kind == "with LoRA":
                if stage.left < LEAST_LEFT:
                    stage.leave_out(kind, "no time was left")
                    break
                model = add_trained_lora(model, settings, stage.device).eval()
            measure(stage, kind, model, prompts, settings, sizes, rows, failed)
        except Exception as error:  # what was measured before stays
            failed[kind] = first_line(error)
        stage.keep(rows=rows, failed=failed)
    if stage.left > LEAST_LEFT:
        stage.keep(attention=with_and_without_cudnn(stage, model, settings, sizes))


def with_and_without_cudnn(stage: Stage, model: Any, settings: ATESDConfig, sizes: Sizes) -> dict:
    """Milliseconds a decoding step of our engine, at lengths that nothing has decoded yet."""
    new = sizes.warm_up * 2
    longer = some_prompts(model.config.vocab_size, sizes._replace(prompt=sizes.prompt + sizes.new_tokens + 1))
    job = partial(our_engine(model, longer, settings), new)

    def step_ms() -> float:
        return 1e3 * timing.timed(job)[0] / new

    with mock.patch.object(hf, "attention_of_any_length", contextlib.nullcontext):
        found = {"with_cudnn_new_lengths_ms": step_ms(), "with_cudnn_again_ms": step_ms()}
    found |= {"new_tokens": new, "without_cudnn_again_ms": step_ms()}
    stage.say(f"a decoding step: {found}")
    return found


def some_prompts(vocab: int, sizes: Sizes) -> list[list[int]]:
    """Random tokens, of lengths between half of the longest and all of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(sizes.prompt // 2, sizes.prompt, sizes.batch).long().tolist()
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def measure(
    stage: Stage, kind: str, model: Any, prompts: list, settings: ATESDConfig, sizes: Sizes, rows: dict, failed: dict
) -> None:
    """Both engines, in turn; with fewer new tokens where there is no time for all of them."""
    jobs: dict[str, Callable[[int], object]] = {}
    slowest = 0.0
    for name, make in ((ENGINE, our_engine), (GENERATE, plain_generate)):
        key = f"{name}, {kind}"
        try:
            job = make(model, prompts, settings)
            job(sizes.warm_up)  # the first call, which loads what is used
            seconds, _ = timing.timed(partial(job, sizes.warm_up))
        except Exception as error:  # an engine that fails is named, and the other is measured
            failed[key] = first_line(error)
            stage.say(f"{key}: {failed[key]}")
            continue
        jobs[key], slowest = job, max(slowest, seconds / sizes.warm_up)
    new = sizes.new_tokens
    while new > sizes.warm_up and slowest * new * len(jobs) > stage.left - 4:
        new //= 2
    if not jobs:
        return

    def after_round(seconds: dict[str, list[timing.Seconds]]) -> None:
        for key, times in seconds.items():
            row = rows.setdefault(key, {"kind": kind})
            row |= timing.summary(times) | {"new_tokens": new, "batch": len(prompts)}
            row["tokens_per_second"] = len(prompts) * new / row["min"]
            row["first_tokens_per_second"] = len(prompts) * new / row["rounds"][0]
            stage.say(f"{key}: {', '.join(f'{1e3 * s / new:.1f}' for s in row['rounds'])} ms a token")
        stage.keep(rows=rows, failed=failed)

    timed = {key: partial(with_peak, job, new, rows.setdefault(key, {"kind": kind})) for key, job in jobs.items()}
    budget = (stage.left - 4) / 2 - len(jobs) * slowest * new  # the second half is for the other kind of model
    timing.interleave(timed, ROUNDS, max(0.0, budget), after_round)


def with_peak(job: Callable[[int], object], new: int, row: dict) -> None:
    row["extra_bytes"] = extra_bytes(partial(job, new))


def our_engine(model: Any, prompts: list[list[int]], settings: ATESDConfig) -> Callable[[int], object]:
    """The engine reads of a tokenizer no more than three token ids."""
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    filters = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    engine = HFEngine(
        model, tokenizer, max_completion_length=settings.max_completion_length, bf16=settings.bf16, **filters
    )
    engine.stop_ids = [NO_END]
    engine.sync()

    def generate(new: int) -> None:
        found = engine.generate(prompts, Sampling(new, **filters, seeds=tuple(range(len(prompts)))))
        if {len(rollout.response_ids) for rollout in found} != {new}:
            raise RuntimeError(f"responses of other lengths than {new}: {[len(r.response_ids) for r in found][:8]}")

    return generate


def plain_generate(model: Any, prompts: list[list[int]], settings: ATESDConfig) -> Callable[[int], object]:
    """Left-padded, as a user would call it."""
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    filters = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}

    @torch.no_grad()
    def generate(new: int) -> None:
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=new, pad_token_id=0, **filters
        )
        if out.shape[1] != width + new:
            raise RuntimeError(f"{out.shape[1] - width} new tokens instead of {new}")

    return generate


def predicted_seconds(model_config: Any, settings: ATESDConfig, sizes: Sizes) -> float:
    """Of all responses, by `atesd scaling`'s formula for one H100."""
    changed = replace(settings, per_device_train_batch_size=sizes.batch, gradient_accumulation_steps=1)
    return plan_time(model_shape(model_config, changed), changed, sizes.prompt, H100, Layout()).rollout


def table(result: dict) -> str:
    sizes, filters = result["sizes"], result["sampling"]
    predicted = result["predicted"] / sizes["new_tokens"]
    lines = [
        f"Qwen3-1.7B's sizes, {sizes['batch']} prompts of up to {sizes['prompt']} tokens, bf16, sampling: "
        + ", ".join(f"{name} {value:g}" for name, value in filters.items())
        + f". `atesd scaling` predicts {1e3 * predicted:.1f} ms a token on an H100, "
        f"{sizes['batch'] / predicted:,.0f} tokens/s."
    ]
    cells = [
        [
            name,
            str(row["new_tokens"]),
            f"{row['first_tokens_per_second']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{1e3 * row['min'] / row['new_tokens']:.1f}",
            f"{row.get('extra_bytes', 0) / 2**30:.2f}",
        ]
        for name, row in result["rows"].items()
        if "median" in row
    ]
    lines += [
        "",
        markdown(
            ["engine", "new tokens", "tokens/s, first", "tokens/s, fastest", "ms a decoding step", "extra GiB"], cells
        ),
    ]
    if result["failed"]:
        lines += ["", *(f"- {name}: {why}" for name, why in result["failed"].items())]
    return "\n".join(lines)
