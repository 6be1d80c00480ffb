"""`atesd scaling`: predicts memory and time of a step for models of 1.7B to 70B on 1 to 64 GPUs.

This file has the models, the search for a layout that fits, and the tables; memory_plan.py has the formulas. It needs
no weights and no GPU. Its numbers are predicted, not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from atesd.config import ATESDConfig, load_config
from atesd.planning.memory_plan import (
    GIB,
    H100,
    GPUSpec,
    Layout,
    MemoryPlan,
    ModelShape,
    TimePlan,
    model_shape,
    plan_memory,
    plan_time,
)
from atesd.reports.markup import markdown_table

QWEN3 = partial(Qwen3Config, vocab_size=151_936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960)
# From the models' configuration files
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3-1.7B": partial(
        QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen3-4B": partial(
        QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": partial(
        QWEN3, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "Qwen3-32B": partial(
        QWEN3, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64,
        tie_word_embeddings=False,
    ),
    "Llama 3 70B": partial(
        LlamaConfig, vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
}  # fmt: skip
GPUS = (1, 2, 4, 8, 16, 32, 64)
RECIPE = "atesd-qwen3-8b"
PROBLEMS = 64  # per step, for any number of GPUs
PROMPT_TOKENS = 1024  # student's and teacher's
LABEL = "Predicted, not measured on a GPU"


@dataclass(frozen=True)
class Prediction:
    layout: Layout
    micro_batch: int
    memory: MemoryPlan
    time: TimePlan


@cache
def shape_of(model: str, use_peft: bool, lora_r: int, lora_target_modules: str) -> ModelShape:
    settings = ATESDConfig(use_peft=use_peft, lora_r=lora_r, lora_target_modules=lora_target_modules)
    return model_shape(MODELS[model](), settings)


def predict(model: str, config: ATESDConfig, gpus: int, gpu: GPUSpec = H100) -> Prediction | None:
    """Returns the layout that fits with the fewest shards, then the largest micro-batch; None if none fits.

    Fewer shards are better because every micro-batch gathers sharded weights again.
    """
    shape = shape_of(model, config.use_peft, config.lora_r, config.lora_target_modules)
    problems = PROBLEMS // gpus
    for shards in (n for n in GPUS if n <= gpus):
        for micro_batch in (n for n in (8, 4, 2, 1) if n <= problems):
            settings = replace(
                config, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=problems // micro_batch
            )
            for decoding in (n for n in GPUS if n <= min(shards, gpu.node)):
                layout = Layout(gpus, shards, decoding)
                memory = plan_memory(shape, settings, PROMPT_TOKENS, "cuda", layout, gpu.memory)
                if memory.total <= gpu.of_memory * gpu.memory:
                    time = plan_time(shape, settings, PROMPT_TOKENS, gpu, layout)
                    return Prediction(layout, micro_batch, memory, time)
    return None


def overview(config: ATESDConfig) -> str:
    """Returns a table with one row per model and one column per number of GPUs."""

    def cell(prediction: Prediction | None) -> str:
        if prediction is None:
            return "does not fit"
        shards = prediction.layout.shards
        sharded = f", weights over {shards}" if shards > 1 else ""
        return f"{prediction.memory.total / GIB:.0f} GiB, {prediction.time.total:.0f} s{sharded}"

    rows = [[model, *(cell(predict(model, config, gpus)) for gpus in GPUS)] for model in MODELS]
    header = [LABEL, *(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS)]
    return markdown_table(header, rows)


def details(config: ATESDConfig) -> str:
    """Returns all parts of every prediction, and their assumptions."""
    parts = [f"{LABEL}: {assumptions(config)}"]
    for model in MODELS:
        rows = []
        for gpus in GPUS:
            found = predict(model, config, gpus)
            if found is None:
                rows.append([str(gpus), "does not fit"] + [""] * (len(MEMORY) + len(SECONDS) + 1))
                continue
            layout, memory, time = found.layout, found.memory, found.time
            rows.append([
                str(gpus), f"{layout.shards} / {layout.decoding} / {found.micro_batch}",
                *(f"{getattr(memory, name) / GIB:.1f}" for name in MEMORY),
                *(f"{getattr(time, name):.1f}" for name in SECONDS),
            ])  # fmt: skip
        header = ["GPUs", "shards / decoding / micro-batch", *(f"{n.replace('_', ' ')} GiB" for n in MEMORY)]
        parts.append(f"{model}\n\n{markdown_table([*header, *(f'{n} s' for n in SECONDS)], rows)}")
    return "\n\n".join(parts)


MEMORY = (
    "weights teacher gradients optimizer kv_cache decoding_copies autocast_copies activations hidden_states loss_chunk "
    "head_gradient communication total"
).split()
SECONDS = "rollout teacher student loss communication total".split()


def assumptions(config: ATESDConfig, gpu: GPUSpec = H100) -> str:
    trained = f"LoRA of rank {config.lora_r}" if config.use_peft else "all weights trained"
    return (
        f"{PROBLEMS} problems a step, prompts of {PROMPT_TOKENS:,} tokens, responses of "
        f"{config.max_completion_length:,}; {trained}, weights in {config.torch_dtype}; {gpu.name}: "
        f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.link / 1e9:.0f} GB/s within a node of "
        f"{gpu.node} and {gpu.network / 1e9:.0f} GB/s between nodes by its data sheet, of which {gpu.of_flops:.0%}, "
        f"{gpu.of_bandwidth:.0%} and {gpu.of_link:.0%} are assumed to be reached; plans fill up to {gpu.of_memory:.0%} "
        "of its memory."
    )


def main(flags: list[str]) -> str:
    """Returns the output of `atesd scaling [--flag value ...]`. The flags of `atesd train` override RECIPE."""
    config = load_config(RECIPE, flags)
    return f"{details(config)}\n\n{overview(config)}"
