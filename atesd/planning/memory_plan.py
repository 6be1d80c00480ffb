"""Predicts the memory of a step by formula, for `--dry-run` and `atesd scaling`.

The numbers for weights, gradients and optimizer are exact. Activations are an estimate; its constants are our own
measurement of the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from atesd.config import ATESDConfig
from atesd.config.mixture import views_of
from atesd.planning.gpu_specs import H100
from atesd.planning.model_shape import ModelShape, cached_numbers
from atesd_kernels.planning import DEFAULT_CHUNK_BYTES, gpu_chunk_bytes

GIB = 1 << 30
FP32, BF16 = 4, 2
FOUR_BITS = 0.5 + 1 / 64 + FP32 / (64 * 256)  # NF4: a byte scales 64 numbers, and a float32 scales 256 of those bytes
# Bytes autograd saves for each of `ModelShape.elements`. Under autocast over fp32 weights, norms and residual stream
# stay in fp32. Measured with saved_tensors_hooks on Llama and Qwen3 layers.
BYTES_PER_ACTIVATION = {"fp32": 4.0, "autocast over fp32 weights": 2.9, "bf16": 2.5}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process. `total` is the permanent memory plus the larger of a step's two phases.

    Permanent: `weights`, `teacher` (0 if it is the base model; of another model on a device of its own only the head),
    `gradients`, `optimizer`.
    While generating: `kv_cache`, and `decoding_copies` of the weights, on a CPU or if they are sharded. While training:
    `autocast_copies`, `activations`, `hidden_states`, `loss_chunk`, `head_gradient` (a trained head's, accumulated over
    the loss's chunks), `communication` (buffers of collectives).
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
    head_gradient: int
    communication: int

    @property
    def always(self) -> int:
        return self.weights + self.teacher + self.gradients + self.optimizer

    @property
    def generating(self) -> int:
        return self.kv_cache + self.decoding_copies

    @property
    def training(self) -> int:
        loss = self.hidden_states + self.loss_chunk + self.head_gradient
        return self.autocast_copies + self.activations + loss + self.communication

    @property
    def total(self) -> int:
        return self.always + max(self.generating, self.training)


@dataclass(frozen=True)
class Layout:
    """How processes, one per GPU, share the work.

    Attributes:
        processes: number in the run; each processes an equal part of a step's problems.
        shards: processes over which weights, gradients and optimizer are sharded (FSDP, ZeRO-3); 1 is data parallel.
        decoding: processes that generate together, each with a slice of every matrix (tensor parallel).
    """

    processes: int = 1
    shards: int = 1
    decoding: int = 1


def trained_bytes(shape: ModelShape, config: ATESDConfig) -> int:
    """Returns the bytes of all gradients. A LoRA adapter's are fp32; others have the parameters' dtype."""
    return shape.lora_parameters * FP32 if config.use_peft else shape.parameters * weight_bytes(config)


def references_in_batch(config: ATESDConfig) -> int:
    """Returns how many references a micro-batch trains on. `sft` takes them as responses; beside distillation each
    problem's comes once."""
    responses = {"sft": config.num_generations, "distill+sft": 1}
    return config.per_device_train_batch_size * responses.get(config.objective, 0)


def weight_bytes(config: ATESDConfig) -> int:
    return FP32 if config.torch_dtype == "float32" else BF16


def gathered_bytes(config: ATESDConfig, parameters: int) -> int:
    """Returns the bytes that FSDP gathers for so many parameters. A bf16 run casts them before the all-gather."""
    return parameters * (BF16 if config.bf16 else weight_bytes(config))


def low_bytes(config: ATESDConfig) -> int:
    """Returns the bytes of one element of a GEMM operand."""
    return BF16 if config.bf16 or config.torch_dtype == "bfloat16" else FP32


def logit_bytes(config: ATESDConfig) -> int:
    """Returns the bytes per logit of the loss's chunk on a GPU: S in fp32, and D in the GEMMs' dtype (overwritten by
    the gradient). A separate teacher head needs S, T and the gradient; in an fp32 run S and T are float64. Against a
    server's top entries it is S and the gradient."""
    low = low_bytes(config)
    if config.teacher == "vllm_server":
        return (2 * FP32 if low == FP32 else FP32) + low
    if config.teacher != "model" and (config.use_peft or config.teacher == "live"):
        return FP32 + low
    return 2 * (2 * FP32 if low == FP32 else FP32) + low


def teacher_model_bytes(teacher: ModelShape, config: ATESDConfig) -> int:
    """Returns the bytes of the weights of another model that teaches."""
    others = FP32 if config.teacher_weights == "float32" else BF16
    of_matrices = FOUR_BITS if config.teacher_weights == "4bit" else others
    return int(teacher.matrices * of_matrices) + (teacher.parameters - teacher.matrices) * others


def head_copy_bytes(teacher: ModelShape, config: ATESDConfig, shards: int) -> int:
    """Returns the bytes of the copy of its head that the loss reads; 0 where the loss reads the head itself."""
    own = FP32 if config.teacher_weights == "float32" else BF16
    wanted = own if config.bf16 else weight_bytes(config)
    copied = config.teacher_device is not None or shards > 1 or wanted != own
    return teacher.vocab * teacher.hidden * wanted * copied


def teacher_bytes(shape: ModelShape, config: ATESDConfig, teacher: ModelShape | None, shards: int) -> int:
    """Returns the bytes that a process holds on its own device for the teacher alone."""
    residual = weight_bytes(config)
    if teacher is not None:
        there = 0 if config.teacher_device else teacher_model_bytes(teacher, config) // shards
        return there + head_copy_bytes(teacher, config, shards)
    if config.teacher == "ema":
        return trained_bytes(shape, config) // shards
    if config.teacher == "frozen" and not config.use_peft:
        matrix_bytes = BF16 if config.bf16 else residual
        return (shape.matrices * matrix_bytes + (shape.parameters - shape.matrices) * residual) // shards
    return 0


def plan_memory(
    shape: ModelShape,
    config: ATESDConfig,
    prompt_tokens: int,
    device: str = "cuda",
    layout: Layout = Layout(),
    memory: float | None = None,
    teacher: ModelShape | None = None,
    reference_tokens: tuple[int, int] = (0, 0),
) -> MemoryPlan:
    """Returns the memory plan of a run. It assumes that every response has `max_completion_length` tokens.

    References beside the responses have a forward and backward of their own, after the responses' backward. So the
    plan counts the larger of the two.

    Args:
        prompt_tokens: longest prompt of student or teacher.
        device: "cuda" or "cpu", for the loss's default chunk.
        memory: bytes of the GPU, which bound that chunk (default: an 80 GB H100's).
        teacher: `teacher_shape(config)`.
        reference_tokens: of a student's prompt and of its reference, where the objective trains on references.
    """
    residual, low, shards = weight_bytes(config), low_bytes(config), layout.shards
    gradients = trained_bytes(shape, config)
    weights = shape.parameters * residual + shape.lora_parameters * FP32
    responses = config.per_device_train_batch_size * config.num_generations  # of a micro-batch
    response_tokens = responses * (prompt_tokens + config.max_completion_length)
    tokens = max(response_tokens, references_in_batch(config) * sum(reference_tokens))
    rows = max(responses * config.max_completion_length, references_in_batch(config) * reference_tokens[1])
    kind = "fp32" if low == FP32 else "autocast over fp32 weights" if residual == FP32 else "bf16"
    a_layer = tokens * shape.elements * BYTES_PER_ACTIVATION[kind]
    if config.gradient_checkpointing:  # each layer's saved input, and all of the layer being recomputed
        kept = shape.hidden * residual
        if config.gradient_checkpointing_mode == "selective":
            kept += shape.products * low
        activations = shape.layers * tokens * kept + a_layer
    else:
        activations = shape.layers * a_layer
    if teacher is not None and not config.teacher_device:  # its forward runs before the student's, a layer at a time
        activations = max(activations, response_tokens * teacher.elements * BYTES_PER_ACTIVATION["bf16"])
    # casts of the matrices, and of the adapter's, live as long as the forward's graph
    cast = shape.lora_parameters + (shape.matrices if residual == FP32 else 0) if config.bf16 and shards == 1 else 0
    # hidden states of the response tokens: student, its gradient, teacher, and their difference
    wide = 4 * shape.hidden if teacher is None else 2 * shape.hidden + teacher.hidden  # other sizes have no difference
    if config.teacher == "vllm_server":  # a float64 log-prob and an int64 id for each entry, two float32 each
        wide = 2 * shape.hidden + 4 * (config.teacher_top_k + 1)
    wide += (len(views_of(config)[0]) - 1) * (shape if teacher is None else teacher).hidden
    hidden_states = rows * wide * FP32
    # the process decodes all rollouts of a step at once
    in_step = responses * config.gradient_accumulation_steps
    cache = in_step * (min(prompt_tokens, config.max_prompt_length) + config.max_completion_length)
    head = shape.vocab * shape.hidden
    a_logit = logit_bytes(config)
    loss_chunk = config.chunk_bytes or DEFAULT_CHUNK_BYTES[device]
    if device == "cuda" and not config.chunk_bytes:
        loss_chunk = gpu_chunk_bytes(rows, shape.vocab, a_logit, not config.use_peft, int(memory or H100.memory))
    head_gradient = 0
    if not config.use_peft:  # a single chunk on a GPU has it in the weights' dtype; several accumulate in fp32
        one_chunk = device == "cuda" and rows * shape.vocab * a_logit <= loss_chunk
        head_gradient = head * (residual if one_chunk else FP32)
    decoding_copies = 0
    if device == "cpu":
        decoding_copies = (shape.matrices + head) * low
    elif shards > 1:
        decoding_copies = (shape.matrices + head) * BF16 // layout.decoding
    communication = 0
    if shards > 1:  # the current layer, the prefetched one, the head, and a layer's gradients in flight
        layer = (shape.matrices + shape.lora_parameters) // shape.layers
        gathered = gathered_bytes(config, 2 * layer + head)
        if teacher is not None:
            gathered = max(gathered, 2 * teacher_model_bytes(teacher, config) // teacher.layers)
        communication = gathered + gradients // shape.layers
    elif layout.processes > 1:  # data parallel: gradients are copied into buckets
        communication = gradients
    return MemoryPlan(
        weights=weights // shards,
        teacher=teacher_bytes(shape, config, teacher, shards),
        gradients=gradients // shards,
        optimizer=2 * gradients // shards,
        kv_cache=cache * cached_numbers(shape.layers, shape.kv) * low,
        decoding_copies=decoding_copies,
        autocast_copies=cast * BF16,
        activations=int(activations),
        hidden_states=hidden_states,
        loss_chunk=loss_chunk,
        head_gradient=head_gradient,
        communication=communication,
    )
