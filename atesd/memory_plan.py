"""What a run needs in memory, by formula: weights, optimizer, activations, loss chunk, key-value cache.

Separate so that `--dry-run`, and any table of what fits where, read the same formulas. Parameters are counted on a
model without storage (torch's meta device), so the numbers for weights, gradients and optimizer are exact; activations
are an estimate, whose constants are our own measurement of the tensors autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd.config import ATESDConfig
from atesd_kernels.planning import DEFAULT_CHUNK_BYTES

GIB = 1 << 30
FP32, BF16 = 4, 2
# Bytes autograd keeps for each of `LayerShape.elements`: the norms and the residual stream stay in fp32 under autocast
# over fp32 weights. Measured with saved_tensors_hooks on Llama and Qwen3 layers.
BYTES_PER_ACTIVATION = {"fp32": 4.0, "autocast over fp32 weights": 2.9, "bf16": 2.5}


@dataclass(frozen=True)
class ModelShape:
    """The sizes the formulas need.

    Attributes:
        parameters: of the model, a tied head counted once.
        lora_parameters: of the adapter, 0 without one.
        matrices: parameters of linear layers other than the head, which autocast casts.
        layers, hidden, intermediate, vocab: as in the model's configuration.
        query, kv: width of the query, and of the key (= value) projection: heads times head size.
    """

    parameters: int
    lora_parameters: int
    matrices: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    kv: int
    vocab: int

    @property
    def elements(self) -> int:
        """Numbers autograd keeps for a token of one layer: both norms' input, normed and scaled output (6 h); query,
        attention output and its transposed copy (3 q); key and value (2 kv); gate, its activation, up, product (4 i).
        """
        return 6 * self.hidden + 3 * self.query + 2 * self.kv + 4 * self.intermediate

    @property
    def products(self) -> int:
        """Of a token and layer, what matrix products and attention return: query, key, value, attention and its
        projection, gate, up and down."""
        return 2 * self.query + 2 * self.kv + 2 * self.hidden + 2 * self.intermediate


def model_shape(model_config: PreTrainedConfig, config: ATESDConfig) -> ModelShape:
    """Counts without weights: the model is built on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = head_size(text)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets = [name.strip() for name in config.lora_target_modules.split(",")]
    adapted = [
        m for name, m in linears.items() if config.lora_target_modules == "all-linear" or name.split(".")[-1] in targets
    ]
    # a LoRA pair: A (r, in) and B (out, r)
    lora = sum(config.lora_r * (m.in_features + m.out_features) for m in adapted) if config.use_peft else 0
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        lora_parameters=lora,
        matrices=sum(m.weight.numel() for m in linears.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * head_dim,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocab=text.vocab_size,
    )


def head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cached_numbers(model_config: PreTrainedConfig) -> int:
    """Numbers a key-value cache keeps of each token: a key and a value in every layer."""
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size(text)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process. `total` adds what is always there to the larger of the two phases of a step.

    Always there: `weights`, `teacher` (0 where it is the base model), `gradients`, `optimizer`.
    While generating: `kv_cache` and, on a CPU, `decoding_copies` of the matrices. While training: `autocast_copies`,
    `activations`, `hidden_states`, `loss_chunk`.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    kv_cache: int
    decoding_copies: int
    autocast_copies: int
    activations: int
    hidden_states: int
    loss_chunk: int

    @property
    def always(self) -> int:
        return self.weights + self.teacher + self.gradients + self.optimizer

    @property
    def generating(self) -> int:
        return self.kv_cache + self.decoding_copies

    @property
    def training(self) -> int:
        return self.autocast_copies + self.activations + self.hidden_states + self.loss_chunk

    @property
    def total(self) -> int:
        return self.always + max(self.generating, self.training)


def plan_memory(
    shape: ModelShape, config: ATESDConfig, prompt_tokens: int, device: str = "cuda", shards: int = 1
) -> MemoryPlan:
    """The memory of a run as `config` says, its responses all of `max_completion_length`.

    Args:
        prompt_tokens: longest prompt of student or teacher.
        device: "cuda" or "cpu", for the loss's default chunk.
        shards: processes over which weights, gradients and optimizer are spread (FSDP, ZeRO-3); data parallel is 1.
    """
    weight_bytes = FP32 if config.torch_dtype == "float32" else BF16
    trained = shape.lora_parameters if config.use_peft else shape.parameters
    # A LoRA adapter is fp32 whatever the base is; gradients and AdamW's two moments have the parameters' type.
    trained_bytes = FP32 if config.use_peft else weight_bytes
    weights = shape.parameters * weight_bytes + shape.lora_parameters * FP32
    if config.teacher == "ema":
        teacher = trained * trained_bytes
    elif config.teacher == "frozen" and not config.use_peft:
        matrix_bytes = BF16 if config.bf16 else weight_bytes
        teacher = shape.matrices * matrix_bytes + (shape.parameters - shape.matrices) * weight_bytes
    else:
        teacher = 0

    responses = config.per_device_train_batch_size * config.num_generations  # of a micro-batch
    tokens = responses * (prompt_tokens + config.max_completion_length)
    low = config.bf16 or config.torch_dtype == "bfloat16"
    residual = FP32 if config.torch_dtype == "float32" else BF16
    kind = "fp32" if not low else "autocast over fp32 weights" if residual == FP32 else "bf16"
    a_layer = tokens * shape.elements * BYTES_PER_ACTIVATION[kind]
    if config.gradient_checkpointing:  # what each layer keeps, and all of the layer being recomputed
        kept = shape.hidden * residual
        if config.gradient_checkpointing_mode == "selective":
            kept += shape.products * (BF16 if low else FP32)
        activations = shape.layers * tokens * kept + a_layer
    else:
        activations = shape.layers * a_layer
    # Casts of matrices live as long as the forward's graph; those the adapter's low-rank products make are its own.
    cast = shape.lora_parameters + (shape.matrices if residual == FP32 else 0) if config.bf16 else 0
    # the response tokens' states: student, its gradient, teacher, and their difference
    hidden_states = 4 * responses * config.max_completion_length * shape.hidden * FP32
    # every rollout of the process's step is decoded at once
    in_step = responses * config.gradient_accumulation_steps
    cache = in_step * (min(prompt_tokens, config.max_prompt_length) + config.max_completion_length)
    return MemoryPlan(
        weights=weights // shards,
        teacher=teacher // shards,
        gradients=trained * trained_bytes // shards,
        optimizer=2 * trained * trained_bytes // shards,
        kv_cache=cache * shape.layers * 2 * shape.kv * (BF16 if low else FP32),
        decoding_copies=(shape.matrices + shape.vocab * shape.hidden) * (BF16 if low else FP32) * (device == "cpu"),
        autocast_copies=cast * BF16,
        activations=int(activations),
        hidden_states=hidden_states,
        loss_chunk=config.chunk_bytes or DEFAULT_CHUNK_BYTES[device],
    )


def describe(plan: MemoryPlan, shape: ModelShape, notes: dict[str, Any]) -> str:
    """The plan as a table for people; `notes` are lines above it."""
    rows = [
        ("weights", plan.weights, f"{shape.parameters:,} parameters, and {shape.lora_parameters:,} of the adapter"),
        ("teacher", plan.teacher, "a copy beside the student's weights" if plan.teacher else "the base: no copy"),
        ("gradients", plan.gradients, ""),
        ("optimizer", plan.optimizer, "AdamW: two moments"),
        ("KV cache", plan.kv_cache, "while generating, all rollouts of a step at once"),
        ("decoding copies", plan.decoding_copies, "while generating, on a CPU: matrices in the processor's layout"),
        ("autocast copies", plan.autocast_copies, "while training"),
        ("activations", plan.activations, "while training; estimated"),
        ("hidden states", plan.hidden_states, "while training"),
        ("loss chunk", plan.loss_chunk, f"while training; the only thing {shape.vocab:,} wide"),
        ("total", plan.total, "always there + the larger of generating and training"),
    ]
    rows = [row for row in rows if row[1] or row[0] == "teacher"]
    lines = [f"  {name:16} {value}" for name, value in notes.items()]
    return "\n".join([*lines, *(f"  {name:16} {size / GIB:8.2f} GiB  {note}".rstrip() for name, size, note in rows)])
