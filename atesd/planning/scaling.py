"""`atesd scaling`: predicts memory and time of a step for models of 1.7B to 70B on 1 to 64 GPUs.

This file has the models, the search for a layout that fits, and the tables; memory_plan.py and time_plan.py have the
formulas. It needs no weights and no GPU. Its numbers are predicted, not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from atesd.config import ATESDConfig, load_config
from atesd.planning.gpu_specs import H100, GPUSpec
from atesd.planning.memory_plan import GIB, Layout, MemoryPlan, plan_memory, references_in_batch
from atesd.planning.model_shape import ModelShape, model_shape, teacher_shape
from atesd.planning.time_plan import TimePlan, plan_time
from atesd.reports.markup import markdown_table
from atesd.reports.printout import Printout, Table

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


def predict(
    model: str, config: ATESDConfig, gpus: int, gpu: GPUSpec = H100, teacher: ModelShape | None = None
) -> Prediction | None:
    """Returns the layout that fits with the fewest shards, then the largest micro-batch; None if none fits.

    `teacher` is `teacher_shape(config)`.
    Fewer shards are better because every micro-batch gathers sharded weights again.
    """
    shape = shape_of(model, config.use_peft, config.lora_r, config.lora_target_modules)
    problems, references = PROBLEMS // gpus, (PROMPT_TOKENS, config.max_completion_length)
    for shards in (n for n in GPUS if n <= gpus):
        for micro_batch in (n for n in (8, 4, 2, 1) if n <= problems):
            settings = replace(
                config, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=problems // micro_batch
            )
            for decoding in (n for n in GPUS if n <= min(shards, gpu.node)):
                layout = Layout(gpus, shards, decoding)
                memory = plan_memory(shape, settings, PROMPT_TOKENS, "cuda", layout, gpu.memory, teacher, references)
                if memory.total <= gpu.of_memory * gpu.memory:
                    time = plan_time(shape, settings, PROMPT_TOKENS, gpu, layout, teacher, references)
                    return Prediction(layout, micro_batch, memory, time)
    return None


def overview(config: ATESDConfig) -> str:
    """Returns a markdown table with one row per model and one column per number of GPUs."""
    table = overview_table(predictions(config))
    return markdown_table(table.header, table.rows)


def predictions(config: ATESDConfig) -> dict[str, dict[int, Prediction | None]]:
    teacher = teacher_shape(config)
    return {model: {gpus: predict(model, config, gpus, teacher=teacher) for gpus in GPUS} for model in MODELS}


def overview_table(found: dict[str, dict[int, Prediction | None]]) -> Table:
    def cell(prediction: Prediction | None) -> str:
        if prediction is None:
            return "does not fit"
        shards = prediction.layout.shards
        sharded = f", weights over {shards}" if shards > 1 else ""
        return f"{prediction.memory.total / GIB:.0f} GiB, {prediction.time.total:.0f} s{sharded}"

    rows = [[model, *map(cell, of_model.values())] for model, of_model in found.items()]
    return Table("", rows, [LABEL, *(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS)])


def details_table(model: str, of_model: dict[int, Prediction | None]) -> Table:
    """Returns all parts of a model's predictions: one row per part, one column per number of GPUs."""
    columns = [column(prediction) for prediction in of_model.values()]
    names = ["shards", "GPUs that decode", "micro-batch", *(f"{name.replace('_', ' ')}, GiB" for name in MEMORY)]
    names += [f"{name}, s" for name in SECONDS]
    rows = [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]
    return Table(model, rows, ["GPUs", *map(str, of_model)])


def column(found: Prediction | None) -> list[str]:
    if found is None:
        return ["-"] * (3 + len(MEMORY) + len(SECONDS))
    layout = [str(n) for n in (found.layout.shards, found.layout.decoding, found.micro_batch)]
    memory = [f"{getattr(found.memory, name) / GIB:.1f}" for name in MEMORY]
    return [*layout, *memory, *(f"{getattr(found.time, name):.1f}" for name in SECONDS)]


def as_json(found: Prediction | None) -> dict[str, Any] | None:
    """Returns a prediction in bytes and seconds; None if no layout fits."""
    if found is None:
        return None
    return {
        "shards": found.layout.shards,
        "decoding": found.layout.decoding,
        "micro_batch": found.micro_batch,
        "bytes": {name: getattr(found.memory, name) for name in MEMORY},
        "seconds": {name: getattr(found.time, name) for name in SECONDS},
    }


MEMORY = (
    "weights teacher gradients optimizer kv_cache decoding_copies autocast_copies activations hidden_states loss_chunk "
    "head_gradient communication total"
).split()
SECONDS = "rollout teacher student loss communication total".split()


def assumptions(config: ATESDConfig, gpu: GPUSpec = H100) -> str:
    references = ", as long as the references that are trained on" if references_in_batch(config) else ""
    trained = f"LoRA of rank {config.lora_r}" if config.use_peft else "all weights trained"
    return (
        f"{PROBLEMS} problems a step, prompts of {PROMPT_TOKENS:,} tokens, responses of "
        f"{config.max_completion_length:,}{references}; {trained}, weights in {config.torch_dtype}; {gpu.name}: "
        f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.link / 1e9:.0f} GB/s within a node of "
        f"{gpu.node} and {gpu.network / 1e9:.0f} GB/s between nodes by its data sheet, of which {gpu.of_flops:.0%}, "
        f"{gpu.of_bandwidth:.0%} and {gpu.of_link:.0%} are assumed to be reached; plans fill up to {gpu.of_memory:.0%} "
        "of its memory."
    )


def main(flags: list[str]) -> Printout:
    """Returns the output of `atesd scaling [--flag value ...]`. The flags of `atesd train` override RECIPE."""
    config = load_config(RECIPE, flags)
    found = predictions(config)
    tables = [details_table(model, of_model) for model, of_model in found.items()]
    return Printout(
        [f"{LABEL}: {assumptions(config)}", *tables, "A column of - does not fit.", overview_table(found)],
        {
            "assumptions": f"{LABEL}: {assumptions(config)}",
            "models": {m: {gpus: as_json(p) for gpus, p in of_model.items()} for m, of_model in found.items()},
        },
    )
