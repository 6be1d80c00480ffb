"""Predicts traffic and time of a step by formula, for `atesd scaling`.

Times follow from a device's data sheet: GEMMs from their FLOPs, the kernels between them from the bytes they move
(`layer_traffic`). The plan omits host launches and assumes that they run ahead of the GPU; small micro-batches, and
layers as fast as Liger's, may have to wait for them. It also omits casts of weights, the embedding, and the adapter's
products, which are too thin to reach a GPU's speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from atesd.config import ATESDConfig
from atesd.config.mixture import teacher_forwards
from atesd.planning.gpu_specs import GPUSpec
from atesd.planning.memory_plan import (
    BF16,
    Layout,
    gathered_bytes,
    low_bytes,
    references_in_batch,
    teacher_model_bytes,
    trained_bytes,
)
from atesd.planning.model_shape import ModelShape, cached_numbers


@dataclass(frozen=True)
class Traffic:
    """Bytes of one process's collectives in a step, before the ring's factor (n - 1)/n.

    `gathered`: weights all-gathered over `shards`. `scattered`: gradients reduce-scattered over them. `reduced`:
    gradients all-reduced over replicas.
    """

    gathered: int
    scattered: int
    reduced: int


def plan_traffic(shape: ModelShape, config: ATESDConfig, layout: Layout, teacher: ModelShape | None = None) -> Traffic:
    """Returns a step's traffic. FSDP gathers weights for the teacher, and for the student's forward and backward; for
    references beside the responses once more."""
    gradients = trained_bytes(shape, config)
    weights = gathered_bytes(config, shape.parameters + shape.lora_parameters)
    of_teacher = weights if teacher is None else teacher_model_bytes(teacher, config)
    of_teacher *= config.teacher != "vllm_server"
    sharded = config.gradient_accumulation_steps * (layout.shards > 1)
    backwards = 1 + (references_in_step(config) > 0)
    return Traffic(
        gathered=sharded * (2 * backwards * weights + of_teacher),
        scattered=sharded * backwards * gradients,
        reduced=gradients // layout.shards if layout.processes > layout.shards else 0,
    )


def references_in_step(config: ATESDConfig) -> int:
    """Returns how many references a step trains on beside its responses. Those of `sft` are the responses."""
    beside = config.objective != "sft"
    return beside * references_in_batch(config) * config.gradient_accumulation_steps


@dataclass(frozen=True)
class Products:
    """FLOPs of one process's GEMMs in a step: 2 per token and matrix element.

    `prefill` and `decoding` are for rollouts; `decoding` is for one token of every response. `teacher`, `student`
    (forward and backward) and `loss` are for training.
    """

    prefill: int
    decoding: int
    teacher: int
    student: int
    loss: int


def plan_products(
    shape: ModelShape,
    config: ATESDConfig,
    prompt_tokens: int,
    teacher: ModelShape | None = None,
    reference_tokens: tuple[int, int] = (0, 0),
) -> Products:
    """Returns a step's FLOPs for responses of `max_completion_length`. Omits the causally masked half of attention.

    `teacher` is `teacher_shape(config)`. `reference_tokens` are those of the student's prompt and of the reference,
    which count where the objective trains on references beside the responses.
    """
    response = config.max_completion_length
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    length, head = prompt_tokens + response, shape.vocab * shape.hidden
    references, reference_length = references_in_step(config), sum(reference_tokens)

    def without_adapter(model: ModelShape, sequences: int, length: int) -> int:
        attention = model.layers * 4 * model.query * length // 2  # per token: scores, and the weighted sum of values
        return sequences * length * (2 * model.matrices + attention)

    forward = without_adapter(shape, responses, length) + without_adapter(shape, references, reference_length)
    forward += (responses * length + references * reference_length) * 2 * shape.lora_parameters
    # the teacher's part of the loss: the differences, the logits of its own head, or nothing of a server's
    other_head = head if teacher is None else shape.vocab * teacher.hidden * teacher_forwards(config)
    other_head *= config.teacher != "vllm_server"
    # backward: gradients of activations; of weights if trained; one more forward if it is recomputed
    passes = 2 + (not config.use_peft)
    passes += config.gradient_checkpointing and config.gradient_checkpointing_mode == "full"
    return Products(
        prefill=responses * prompt_tokens * 2 * shape.matrices,
        decoding=responses * 2 * (shape.matrices + head),
        teacher=teacher_forwards(config) * without_adapter(shape if teacher is None else teacher, responses, length),
        student=passes * forward,
        # the student's logits, the hidden states' gradient, and a trained head's gradient; then the teacher's part
        loss=(2 + (not config.use_peft)) * head * 2 * (responses * response + references * reference_tokens[1])
        + other_head * 2 * responses * response,
    )


# Bytes that the kernels between a layer's GEMMs read and write per element of (hidden states, query and key, gated
# MLP), in bf16. transformers: a norm converts to fp32 and back in six kernels, 32 bytes; there are two on the hidden
# states and one on query and key. Two residual sums take 6 each, rotations 20, activation and gate 10. Liger: a norm
# and a rotation are one kernel each, 4 bytes; activation and gate are one kernel, 6.
KERNEL_BYTES = {"transformers": (76, 52, 10), "liger": (20, 8, 6)}
ADAPTER_BYTES = 10  # per element of a linear layer's output: scale and add the adapter's part


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes that the kernels between the layers' GEMMs read and write in one process's step."""

    teacher: int
    student: int  # forward and backward


def layer_traffic(
    shape: ModelShape,
    config: ATESDConfig,
    prompt_tokens: int,
    teacher: ModelShape | None = None,
    reference_tokens: tuple[int, int] = (0, 0),
) -> LayerTraffic:
    """Returns a step's traffic for layers like Qwen3's in bf16. Backward moves about twice the bytes of forward.

    Arguments are as in `plan_products`.
    """
    hidden, heads, mlp = KERNEL_BYTES["liger" if config.use_liger_kernel else "transformers"]

    def forward(model: ModelShape) -> int:  # per token
        layer = hidden * model.hidden + heads * (model.query + model.kv) + mlp * model.intermediate
        return model.layers * layer

    outputs = shape.query + 2 * shape.kv + 2 * shape.hidden + 2 * shape.intermediate
    adapter = ADAPTER_BYTES * outputs if config.use_peft else 0
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    tokens = responses * (prompt_tokens + config.max_completion_length)
    of_references = references_in_step(config) * sum(reference_tokens)
    passes = 3 + config.gradient_checkpointing
    return LayerTraffic(
        teacher=teacher_forwards(config) * tokens * forward(shape if teacher is None else teacher),
        student=(tokens + of_references) * (forward(shape) + shape.layers * adapter) * passes,
    )


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a distillation step. Collectives overlap with training, so `total` counts the longer of the two."""

    rollout: float
    teacher: float
    student: float
    loss: float
    communication: float

    @property
    def total(self) -> float:
        return self.rollout + max(self.teacher + self.student + self.loss, self.communication)


def plan_time(
    shape: ModelShape,
    config: ATESDConfig,
    prompt_tokens: int,
    gpu: GPUSpec,
    layout: Layout,
    teacher: ModelShape | None = None,
    reference_tokens: tuple[int, int] = (0, 0),
) -> TimePlan:
    """Returns the time of a step that decodes all responses at once. Omits checkpoints, probes and evaluations.

    `teacher` and `reference_tokens` are as in `plan_products`. Omits what 4-bit weights take to unpack.
    """
    read = (prompt_tokens, teacher, reference_tokens)
    products, speed = plan_products(shape, config, *read), gpu.flops * gpu.of_flops
    between, moved = layer_traffic(shape, config, *read), gpu.bandwidth * gpu.of_bandwidth
    response = config.max_completion_length
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    # per token, decoding reads all matrices and the cache, which has half of the response on average
    reading = (shape.matrices + shape.vocab * shape.hidden) * BF16 / layout.decoding
    reading += responses * (prompt_tokens + response / 2) * cached_numbers(shape.layers, shape.kv) * low_bytes(config)
    a_token = max(reading / moved, products.decoding / speed)
    if layout.decoding > 1:  # two all-reduces per layer
        summed = 2 * layout.decoding * responses * shape.hidden * BF16
        a_token += 2 * shape.layers * (gpu.latency + summed / gpu.wire(layout.decoding))

    traffic, replicas = plan_traffic(shape, config, layout, teacher), layout.processes // layout.shards
    communication = ring(layout.shards) * (traffic.gathered + traffic.scattered) / gpu.wire(layout.shards)
    communication += 2 * ring(replicas) * traffic.reduced / gpu.wire(layout.processes)
    return TimePlan(
        rollout=products.prefill / speed + response * a_token,
        teacher=products.teacher / speed + between.teacher / moved,
        student=products.student / speed + between.student / moved,
        loss=products.loss / speed,
        communication=communication,
    )


def ring(processes: int) -> float:
    """Returns the share of a collective's bytes that a process receives from others."""
    return (processes - 1) / processes
