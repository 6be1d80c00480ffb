"""Predicts memory, traffic and time of a step by formula, for `--dry-run` and `atesd scaling`.

Parameters are counted on torch's meta device, so the numbers for weights, gradients and optimizer are exact.
Activations are an estimate; its constants are our own measurement of the tensors that autograd saves.

Times follow from a device's data sheet: GEMMs from their FLOPs, the kernels between them from the bytes they move
(`layer_traffic`). The plan omits host launches and assumes that they run ahead of the GPU; small micro-batches, and
layers as fast as Liger's, may have to wait for them. It also omits casts of weights, the embedding, and the adapter's
products, which are too thin to reach a GPU's speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd.config import ATESDConfig
from atesd.config.mixture import teacher_forwards, views_of
from atesd.models.loading import load_model_config
from atesd.models.other_teacher import teacher_source
from atesd_kernels.planning import DEFAULT_CHUNK_BYTES, gpu_chunk_bytes
from atesd_kernels.tools.gpus import BY_ARCH

GIB = 1 << 30
FP32, BF16 = 4, 2
FOUR_BITS = 0.5 + 1 / 64 + FP32 / (64 * 256)  # NF4: a byte scales 64 numbers, and a float32 scales 256 of those bytes
# Bytes autograd saves for each of `ModelShape.elements`. Under autocast over fp32 weights, norms and residual stream
# stay in fp32. Measured with saved_tensors_hooks on Llama and Qwen3 layers.
BYTES_PER_ACTIVATION = {"fp32": 4.0, "autocast over fp32 weights": 2.9, "bf16": 2.5}


@dataclass(frozen=True)
class ModelShape:
    """The model sizes that the formulas need.

    Attributes:
        parameters: number of the model's parameters; a tied head counts once.
        lora_parameters: number of the adapter's parameters; 0 without one.
        matrices: parameters of all linear layers but the head; autocast casts these.
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
        """Numbers autograd saves per token and layer: both norms' input, normed and scaled output (6 h); query,
        attention output and its transposed copy (3 q); key and value (2 kv); gate, its activation, up, product (4 i).
        """
        return 6 * self.hidden + 3 * self.query + 2 * self.kv + 4 * self.intermediate

    @property
    def products(self) -> int:
        """Numbers that GEMMs and attention return per token and layer: query, key, value, attention and its
        projection, gate, up and down."""
        return 2 * self.query + 2 * self.kv + 2 * self.hidden + 2 * self.intermediate


def model_shape(model_config: PreTrainedConfig, config: ATESDConfig) -> ModelShape:
    """Returns the sizes of a model, which it builds on the meta device, without weights."""
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
        kv=key_size(text),
        vocab=text.vocab_size,
    )


def teacher_shape(config: ATESDConfig) -> ModelShape | None:
    """Returns the sizes of the other model that teaches; None if there is none. Raises ModelLoadError."""
    source = teacher_source(config)
    return None if source is None else model_shape(load_model_config(source), replace(config, use_peft=False))


def head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def key_size(text: PreTrainedConfig) -> int:
    """Returns the size of a token's keys in one layer, over all heads. Its values have the same size."""
    return (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_size(text)


def cached_numbers(layers: int, key_size: int) -> int:
    """Returns how many numbers a key-value cache stores per token: a key and a value in every layer."""
    return 2 * layers * key_size


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
) -> MemoryPlan:
    """Returns the memory plan of a run. It assumes that every response has `max_completion_length` tokens.

    Args:
        prompt_tokens: longest prompt of student or teacher.
        device: "cuda" or "cpu", for the loss's default chunk.
        memory: bytes of the GPU, which bound that chunk (default: an 80 GB H100's).
        teacher: `teacher_shape(config)`.
    """
    residual, low, shards = weight_bytes(config), low_bytes(config), layout.shards
    gradients = trained_bytes(shape, config)
    weights = shape.parameters * residual + shape.lora_parameters * FP32
    responses = config.per_device_train_batch_size * config.num_generations  # of a micro-batch
    tokens = responses * (prompt_tokens + config.max_completion_length)
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
        activations = max(activations, tokens * teacher.elements * BYTES_PER_ACTIVATION["bf16"])
    # casts of the matrices, and of the adapter's, live as long as the forward's graph
    cast = shape.lora_parameters + (shape.matrices if residual == FP32 else 0) if config.bf16 and shards == 1 else 0
    # hidden states of the response tokens: student, its gradient, teacher, and their difference
    wide = 4 * shape.hidden if teacher is None else 2 * shape.hidden + teacher.hidden  # other sizes have no difference
    if config.teacher == "vllm_server":  # a float64 log-prob and an int64 id for each entry, two float32 each
        wide = 2 * shape.hidden + 4 * (config.teacher_top_k + 1)
    wide += (len(views_of(config)[0]) - 1) * (shape if teacher is None else teacher).hidden
    hidden_states = responses * config.max_completion_length * wide * FP32
    # the process decodes all rollouts of a step at once
    in_step = responses * config.gradient_accumulation_steps
    cache = in_step * (min(prompt_tokens, config.max_prompt_length) + config.max_completion_length)
    head = shape.vocab * shape.hidden
    rows, a_logit = responses * config.max_completion_length, logit_bytes(config)
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


@dataclass(frozen=True)
class GPUSpec:
    """A GPU by its data sheet, and the shares of it we expect to reach (our assumptions, not measured).

    Attributes:
        memory: bytes; flops: dense bf16 FLOPs per second; bandwidth: of its memory, bytes per second.
        link, network: bytes per second to a GPU in the same node, and in another node, each way.
        node: GPUs per node.
        of_memory: share that a plan may fill; allocator, CUDA and libraries need the rest.
        of_flops, of_bandwidth, of_link: shares that layers, decoding and collectives reach.
        latency: minimum duration of a collective, in seconds.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    node: int = 8
    of_memory: float = 0.9
    of_flops: float = 0.5
    of_bandwidth: float = 0.6
    of_link: float = 0.7
    latency: float = 20e-6

    def wire(self, processes: int) -> float:
        """Returns the bytes per second that a process sends in a group of this size."""
        return self.of_link * (self.link if processes <= self.node else self.network)


# From NVIDIA's data sheets: H100 and H200 SXM (NVLink 900 GB/s, half of it each way), and DGX H100 (400 Gb/s of network
# per GPU)
H100 = GPUSpec(
    "H100 SXM 80 GB",
    memory=80e9,
    flops=BY_ARCH["sm_90"].tflops * 1e12,
    bandwidth=BY_ARCH["sm_90"].terabytes * 1e12,
    link=450e9,
    network=50e9,
)
H200 = replace(H100, name="H200 SXM 141 GB", memory=141e9, bandwidth=4.8e12)


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
    """Returns a step's traffic. FSDP gathers weights for the teacher, and for the student's forward and backward."""
    gradients = trained_bytes(shape, config)
    weights = gathered_bytes(config, shape.parameters + shape.lora_parameters)
    of_teacher = weights if teacher is None else teacher_model_bytes(teacher, config)
    of_teacher *= config.teacher != "vllm_server"
    sharded = config.gradient_accumulation_steps * (layout.shards > 1)
    return Traffic(
        gathered=sharded * (2 * weights + of_teacher),
        scattered=sharded * gradients,
        reduced=gradients // layout.shards if layout.processes > layout.shards else 0,
    )


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
    shape: ModelShape, config: ATESDConfig, prompt_tokens: int, teacher: ModelShape | None = None
) -> Products:
    """Returns a step's FLOPs for responses of `max_completion_length`. Omits the causally masked half of attention.

    `teacher` is `teacher_shape(config)`.
    """
    response = config.max_completion_length
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    length, head = prompt_tokens + response, shape.vocab * shape.hidden

    def without_adapter(model: ModelShape) -> int:
        attention = model.layers * 4 * model.query * length // 2  # per token: scores, and the weighted sum of values
        return responses * length * (2 * model.matrices + attention)

    forward = without_adapter(shape) + responses * length * 2 * shape.lora_parameters
    # the teacher's part of the loss: the differences, the logits of its own head, or nothing of a server's
    other_head = head if teacher is None else shape.vocab * teacher.hidden * teacher_forwards(config)
    other_head *= config.teacher != "vllm_server"
    # backward: gradients of activations; of weights if trained; one more forward if it is recomputed
    passes = 2 + (not config.use_peft)
    passes += config.gradient_checkpointing and config.gradient_checkpointing_mode == "full"
    return Products(
        prefill=responses * prompt_tokens * 2 * shape.matrices,
        decoding=responses * 2 * (shape.matrices + head),
        teacher=teacher_forwards(config) * without_adapter(shape if teacher is None else teacher),
        student=passes * forward,
        # the student's logits, the hidden states' gradient, and a trained head's gradient; then the teacher's part
        loss=((2 + (not config.use_peft)) * head + other_head) * 2 * responses * response,
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
    shape: ModelShape, config: ATESDConfig, prompt_tokens: int, teacher: ModelShape | None = None
) -> LayerTraffic:
    """Returns a step's traffic for layers like Qwen3's in bf16. Backward moves about twice the bytes of forward."""
    hidden, heads, mlp = KERNEL_BYTES["liger" if config.use_liger_kernel else "transformers"]

    def forward(model: ModelShape) -> int:  # per token
        layer = hidden * model.hidden + heads * (model.query + model.kv) + mlp * model.intermediate
        return model.layers * layer

    outputs = shape.query + 2 * shape.kv + 2 * shape.hidden + 2 * shape.intermediate
    adapter = ADAPTER_BYTES * outputs if config.use_peft else 0
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    tokens = responses * (prompt_tokens + config.max_completion_length)
    passes = 3 + config.gradient_checkpointing
    return LayerTraffic(
        teacher=teacher_forwards(config) * tokens * forward(shape if teacher is None else teacher),
        student=tokens * (forward(shape) + shape.layers * adapter) * passes,
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
) -> TimePlan:
    """Returns the time of a step that decodes all responses at once. Omits checkpoints, probes and evaluations.

    `teacher` is `teacher_shape(config)`. Omits what 4-bit weights take to unpack.
    """
    products, speed = plan_products(shape, config, prompt_tokens, teacher), gpu.flops * gpu.of_flops
    between, moved = layer_traffic(shape, config, prompt_tokens, teacher), gpu.bandwidth * gpu.of_bandwidth
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
