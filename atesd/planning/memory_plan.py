"""What a step needs in memory, traffic and time, by formula.

Separate so that `--dry-run` and `atesd scaling` read the same formulas. Parameters are counted on a model without
storage (torch's meta device), so the numbers for weights, gradients and optimizer are exact; activations are an
estimate, whose constants are our own measurement of the tensors autograd keeps.

Times are predicted from a device's data sheet: matrix products by their FLOPs, everything between them by the bytes it
moves (`layer_traffic`). Left out are the host's launches, which the plan takes to run ahead of the GPU (small
micro-batches, and layers as fast as Liger's, can wait for them), casts of weights, the adapter's products, which are
too thin to reach a GPU's speed, and the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd.config import ATESDConfig
from atesd_kernels.planning import DEFAULT_CHUNK_BYTES, gpu_chunk_bytes

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
    While generating: `kv_cache` and `decoding_copies` of the weights, on a CPU or beside sharded ones. While training:
    `autocast_copies`, `activations`, `hidden_states`, `loss_chunk`, `head_gradient` (a trained head's, added up over
    the loss's chunks), `communication` (what other processes send).
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
    """How processes, one a GPU, share the work.

    Attributes:
        processes: of the whole run, each with its share of a step's problems.
        shards: processes over which weights, gradients and optimizer are spread (FSDP, ZeRO-3); 1 is data parallel.
        decoding: processes that generate together, each with a slice of every matrix (tensor parallel).
    """

    processes: int = 1
    shards: int = 1
    decoding: int = 1


def trained_bytes(shape: ModelShape, config: ATESDConfig) -> int:
    """Of the gradients: a LoRA adapter is fp32 whatever the base is, others have the parameters' type."""
    return shape.lora_parameters * FP32 if config.use_peft else shape.parameters * weight_bytes(config)


def weight_bytes(config: ATESDConfig) -> int:
    return FP32 if config.torch_dtype == "float32" else BF16


def gathered_bytes(config: ATESDConfig, parameters: int) -> int:
    """Of so many weights as FSDP gathers them: cast before they travel, where the run computes in bf16."""
    return parameters * (BF16 if config.bf16 else weight_bytes(config))


def low_bytes(config: ATESDConfig) -> int:
    """Of a number that matrix products work on."""
    return BF16 if config.bf16 or config.torch_dtype == "bfloat16" else FP32


def logit_bytes(config: ATESDConfig) -> int:
    """Of a logit in the loss's chunk on a GPU: S in fp32 and D in the products' dtype, which the gradient overwrites.
    Where the teacher has a head of its own, S, T and the gradient; S and T of a run in fp32 are in float64."""
    low = low_bytes(config)
    if config.use_peft or config.teacher == "live":
        return FP32 + low
    return 2 * (2 * FP32 if low == FP32 else FP32) + low


def plan_memory(
    shape: ModelShape,
    config: ATESDConfig,
    prompt_tokens: int,
    device: str = "cuda",
    layout: Layout = Layout(),
    memory: float | None = None,
) -> MemoryPlan:
    """The memory of a run as `config` says, its responses all of `max_completion_length`.

    Args:
        prompt_tokens: longest prompt of student or teacher.
        device: "cuda" or "cpu", for the loss's default chunk.
        memory: bytes of the GPU, which bound that chunk (default: an 80 GB H100's).
    """
    residual, low, shards = weight_bytes(config), low_bytes(config), layout.shards
    gradients = trained_bytes(shape, config)
    weights = shape.parameters * residual + shape.lora_parameters * FP32
    if config.teacher == "ema":
        teacher = gradients
    elif config.teacher == "frozen" and not config.use_peft:
        matrix_bytes = BF16 if config.bf16 else residual
        teacher = shape.matrices * matrix_bytes + (shape.parameters - shape.matrices) * residual
    else:
        teacher = 0

    responses = config.per_device_train_batch_size * config.num_generations  # of a micro-batch
    tokens = responses * (prompt_tokens + config.max_completion_length)
    kind = "fp32" if low == FP32 else "autocast over fp32 weights" if residual == FP32 else "bf16"
    a_layer = tokens * shape.elements * BYTES_PER_ACTIVATION[kind]
    if config.gradient_checkpointing:  # what each layer keeps, and all of the layer being recomputed
        kept = shape.hidden * residual
        if config.gradient_checkpointing_mode == "selective":
            kept += shape.products * low
        activations = shape.layers * tokens * kept + a_layer
    else:
        activations = shape.layers * a_layer
    # Casts of matrices live as long as the forward's graph; those the adapter's low-rank products make are its own.
    cast = shape.lora_parameters + (shape.matrices if residual == FP32 else 0) if config.bf16 and shards == 1 else 0
    # the response tokens' states: student, its gradient, teacher, and their difference
    hidden_states = 4 * responses * config.max_completion_length * shape.hidden * FP32
    # every rollout of the process's step is decoded at once
    in_step = responses * config.gradient_accumulation_steps
    cache = in_step * (min(prompt_tokens, config.max_prompt_length) + config.max_completion_length)
    head = shape.vocab * shape.hidden
    rows, a_logit = responses * config.max_completion_length, logit_bytes(config)
    loss_chunk = config.chunk_bytes or DEFAULT_CHUNK_BYTES[device]
    if device == "cuda" and not config.chunk_bytes:
        loss_chunk = gpu_chunk_bytes(rows, shape.vocab, a_logit, not config.use_peft, int(memory or H100.memory))
    head_gradient = 0
    if not config.use_peft:  # one chunk on a GPU gives it in the weights' dtype; a sum of several is in fp32
        one_chunk = device == "cuda" and rows * shape.vocab * a_logit <= loss_chunk
        head_gradient = head * (residual if one_chunk else FP32)
    decoding_copies = 0
    if device == "cpu":
        decoding_copies = (shape.matrices + head) * low
    elif shards > 1:
        decoding_copies = (shape.matrices + head) * BF16 // layout.decoding
    communication = 0
    if shards > 1:  # the layer in use, the one fetched meanwhile, the head, and a layer's gradients on their way
        layer = (shape.matrices + shape.lora_parameters) // shape.layers
        communication = gathered_bytes(config, 2 * layer + head) + gradients // shape.layers
    elif layout.processes > 1:  # data parallel: gradients are copied into buckets
        communication = gradients
    return MemoryPlan(
        weights=weights // shards,
        teacher=teacher // shards,
        gradients=gradients // shards,
        optimizer=2 * gradients // shards,
        kv_cache=cache * shape.layers * 2 * shape.kv * low,
        decoding_copies=decoding_copies,
        autocast_copies=cast * BF16,
        activations=int(activations),
        hidden_states=hidden_states,
        loss_chunk=loss_chunk,
        head_gradient=head_gradient,
        communication=communication,
    )


@dataclass(frozen=True)
class Accelerator:
    """A GPU by its data sheet, and the shares of it we expect to reach (our assumptions, not measured).

    Attributes:
        memory: bytes; flops: of dense bf16 products, a second; bandwidth: of its memory, bytes a second.
        link, network: bytes a second to a GPU of the same node, and of another one, each way.
        node: GPUs of a node.
        of_memory: share that a plan may fill; the rest is the allocator's, CUDA's and the libraries'.
        of_flops, of_bandwidth, of_link: shares reached by layers, decoding and collectives.
        latency: seconds a collective takes however little it carries.
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
        """Bytes a second that a process of a group of this size sends."""
        return self.of_link * (self.link if processes <= self.node else self.network)


# NVIDIA's data sheets: H100 and H200 SXM (NVLink 900 GB/s, half of it each way), and DGX H100 (400 Gb/s of network for
# each GPU)
H100 = Accelerator("H100 SXM 80 GB", memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9)
H200 = replace(H100, name="H200 SXM 141 GB", memory=141e9, bandwidth=4.8e12)


@dataclass(frozen=True)
class Traffic:
    """Bytes that collectives deliver to, or take from, one process in a step, before any ring's share (n - 1)/n.

    `gathered`: weights, from `shards` processes. `scattered`: gradients, to them. `reduced`: gradients, over replicas.
    """

    gathered: int
    scattered: int
    reduced: int


def plan_traffic(shape: ModelShape, config: ATESDConfig, layout: Layout) -> Traffic:
    """A step's collectives: FSDP gathers weights for the teacher, and for the student's forward and backward."""
    gradients = trained_bytes(shape, config)
    weights = gathered_bytes(config, shape.parameters + shape.lora_parameters)
    sharded = config.gradient_accumulation_steps * (layout.shards > 1)
    return Traffic(
        gathered=3 * sharded * weights,
        scattered=sharded * gradients,
        reduced=gradients // layout.shards if layout.processes > layout.shards else 0,
    )


@dataclass(frozen=True)
class Products:
    """FLOPs of one process's matrix products in a step: a product with a matrix is 2 for each of its numbers.

    `prefill` and `decoding`: rollouts; `decoding` is of one token of every response. `teacher`, `student` (forward and
    backward) and `loss` are of the training.
    """

    prefill: int
    decoding: int
    teacher: int
    student: int
    loss: int


def plan_products(shape: ModelShape, config: ATESDConfig, prompt_tokens: int) -> Products:
    """Responses are all of `max_completion_length`. The half of attention that causality masks is not counted."""
    response = config.max_completion_length
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    length, head = prompt_tokens + response, shape.vocab * shape.hidden
    attention = shape.layers * 4 * shape.query * length // 2  # of a token: scores, and the mean of the values
    teacher = responses * length * (2 * shape.matrices + attention)
    forward = teacher + responses * length * 2 * shape.lora_parameters
    # backward: gradients of activations; of the weights if they are trained; a forward more if it runs again
    passes = 2 + (not config.use_peft)
    passes += config.gradient_checkpointing and config.gradient_checkpointing_mode == "full"
    return Products(
        prefill=responses * prompt_tokens * 2 * shape.matrices,
        decoding=responses * 2 * (shape.matrices + head),
        teacher=teacher,
        student=passes * forward,
        # student's logits, their difference to the teacher's, the hidden states' gradient, and a trained head's
        loss=(3 + (not config.use_peft)) * 2 * responses * response * head,
    )


# Bytes that the kernels between a layer's matrix products read and write for each of (hidden, query and key, the gated
# MLP's width), in bf16. transformers: a norm goes to fp32 and back in six kernels, 32 bytes, and there are two of the
# hidden states and one of query and key; two sums with the residual, 6 each; rotations 20; activation and gate 10.
# Liger: one kernel for a norm and for a rotation, 4 each, and one for activation and gate, 6.
KERNEL_BYTES = {"transformers": (76, 52, 10), "liger": (20, 8, 6)}
ADAPTER_BYTES = 10  # of a linear layer's output: the adapter's part is scaled, and added


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes that the layers' kernels between matrix products read and write in one process's step."""

    teacher: int
    student: int  # forward and backward


def layer_traffic(shape: ModelShape, config: ATESDConfig, prompt_tokens: int) -> LayerTraffic:
    """Counted for a layer of Qwen3's kind, with bf16 weights; backward moves about twice what forward does."""
    hidden, heads, mlp = KERNEL_BYTES["liger" if config.use_liger_kernel else "transformers"]
    forward = hidden * shape.hidden + heads * (shape.query + shape.kv) + mlp * shape.intermediate
    outputs = shape.query + 2 * shape.kv + 2 * shape.hidden + 2 * shape.intermediate
    adapter = ADAPTER_BYTES * outputs if config.use_peft else 0
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    in_layers = responses * (prompt_tokens + config.max_completion_length) * shape.layers
    return LayerTraffic(in_layers * forward, in_layers * (forward + adapter) * (3 + config.gradient_checkpointing))


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a distillation step; collectives run beside the training, so the longer of the two counts."""

    rollout: float
    teacher: float
    student: float
    loss: float
    communication: float

    @property
    def total(self) -> float:
        return self.rollout + max(self.teacher + self.student + self.loss, self.communication)


def plan_time(shape: ModelShape, config: ATESDConfig, prompt_tokens: int, gpu: Accelerator, layout: Layout) -> TimePlan:
    """The time of a step: all its responses decoded at once; checkpoints, probes and evaluations not counted."""
    products, speed = plan_products(shape, config, prompt_tokens), gpu.flops * gpu.of_flops
    between, moved = layer_traffic(shape, config, prompt_tokens), gpu.bandwidth * gpu.of_bandwidth
    response = config.max_completion_length
    responses = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    # decoding reads all matrices for every token, and what is in the cache: on average half of the response
    reading = (shape.matrices + shape.vocab * shape.hidden) * BF16 / layout.decoding
    reading += responses * (prompt_tokens + response / 2) * shape.layers * 2 * shape.kv * low_bytes(config)
    a_token = max(reading / moved, products.decoding / speed)
    if layout.decoding > 1:  # two sums over the group in every layer
        summed = 2 * layout.decoding * responses * shape.hidden * BF16
        a_token += 2 * shape.layers * (gpu.latency + summed / gpu.wire(layout.decoding))

    traffic, replicas = plan_traffic(shape, config, layout), layout.processes // layout.shards
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
    """The share of the bytes that a process gets from others."""
    return (processes - 1) / processes
