"""The losses as torch custom operators: dispatch to a backend, fake implementations for torch.compile, and autograd.

An operator takes its tensors and one string, the encoded `LossSpec`.

Forward computes the gradients, while the logits are in memory; backward scales them. A row's upstream gradient scales
its row of the hidden-state gradient exactly. The gradient of a trained head sums over rows, so it must include row
weights from the start. With a reduction, forward takes the row weights and returns a scalar (`LossSpec.weighted`). With
arbitrary upstream gradients, backward runs the operator again with them as row weights (`LossSpec.runs_again`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import checks, planning
from .backends import elementwise, tuning
from .planning import TORCH
from .shards import Shards
from .spec import DivergenceSpec, LogprobSpec, LossSpec, RowResult, TopkSpec, accumulate_dtype, gradient_dtype
from .stats import TokenStats

Outputs = list[Tensor]  # value, stats, hidden_grad, weight_grad, bias_grad; empty if not requested
NUM_STATS = len(TokenStats._fields)


def _backend(name: str, function: str):
    if ":" in name:
        return getattr(planning.own_backend(name), function)
    kind = planning.VIEWS if function == planning.VIEWS else function.partition("_")[0]
    module = {"topk": "triton_topk", planning.VIEWS: "triton_views"}.get(kind, "triton_chunked")
    if name in TORCH:  # eager, compiled or in C++
        of_torch = {"topk": "torch_topk", "logprob": "torch_logprobs", planning.VIEWS: "torch_views"}
        module = of_torch.get(kind, "torch_chunked")
    return getattr(importlib.import_module(f".backends.{module}", __package__), function)


def _checked_vocab(spec: LossSpec, hidden: Tensor, weight: Tensor, mask: Tensor | None) -> int:
    """Returns the number of entries of the whole vocabulary. With a group, all ranks then make the same call."""
    shards = Shards(spec.group, weight.shape[0], hidden.device)
    if spec.group is not None:
        processors = tuning.num_processors(hidden.device) if spec.backend == "triton" else 0
        shards.require_same(hidden, mask, spec.shared_by_ranks(), processors)
    return shards.vocab


def _outputs(spec: LossSpec, result: RowResult, row_weight: Tensor | None) -> Outputs:
    value, *rest = result
    if spec.weighted:
        value = (value if row_weight is None else value * row_weight.to(value.dtype)).sum()
    return [value, *(value.new_empty(0) if t is None else t for t in rest)]


def _fake_outputs(spec: LossSpec, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Outputs:
    acc, n = accumulate_dtype(spec.compute_dtype), hidden.shape[0]
    inputs = ((hidden, spec.hidden_grad), (weight, spec.weight_grad), (bias, spec.bias_grad))
    return [
        hidden.new_empty(() if spec.weighted else (n,), dtype=acc),
        hidden.new_empty((NUM_STATS, n), dtype=acc) if spec.stats else hidden.new_empty(0, dtype=acc),
        *(
            torch.empty_like(t, dtype=gradient_dtype(t.dtype)) if formed else hidden.new_empty(0, dtype=acc)
            for t, formed in inputs
        ),
    ]


@torch.library.custom_op("atesd_kernels::linear_divergence", mutates_args=())
def linear_divergence_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
    spec: str,
) -> Outputs:
    options = DivergenceSpec.decode_for_forward(spec)
    vocab = _checked_vocab(options, student_hidden, student_weight, mask)
    if targets is not None:
        checks.check_targets(targets, mask, vocab)
    run = _backend(options.backend, "divergence_rows")
    result = run(
        options, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, mask,
        row_weight, targets,
    )  # fmt: skip
    return _outputs(options, result, row_weight)


@linear_divergence_op.register_fake
def _(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, mask, row_weight,
    targets, spec,
):  # fmt: skip
    return _fake_outputs(DivergenceSpec.decode_for_forward(spec), student_hidden, student_weight, student_bias)


@torch.library.custom_op("atesd_kernels::linear_divergence_views", mutates_args=())
def linear_divergence_views_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: list[Tensor],
    teacher_weight: list[Tensor | None],
    teacher_bias: Tensor | None,
    teacher_mix: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
    spec: str,
) -> Outputs:
    """`linear_divergence_op` for a mixture of teachers, as `backends.MixingBackend` describes it."""
    options = DivergenceSpec.decode_for_forward(spec)
    vocab = _checked_vocab(options, student_hidden, student_weight, mask)
    if targets is not None:
        checks.check_targets(targets, mask, vocab)
    planning.require_views(options.backend)
    run = _backend(options.backend, planning.VIEWS)
    result = run(
        options, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        teacher_mix, mask, row_weight, targets,
    )  # fmt: skip
    return _outputs(options, result, row_weight)


@linear_divergence_views_op.register_fake
def _(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, teacher_mix, mask,
    row_weight, targets, spec,
):  # fmt: skip
    return _fake_outputs(DivergenceSpec.decode_for_forward(spec), student_hidden, student_weight, student_bias)


@torch.library.custom_op("atesd_kernels::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    spec: str,
) -> Outputs:
    options = LogprobSpec.decode_for_forward(spec)
    checks.check_targets(targets, mask, _checked_vocab(options, hidden, weight, mask))
    run = _backend(options.backend, "logprob_rows")
    return _outputs(options, run(options, hidden, weight, bias, targets, mask, row_weight), row_weight)


@linear_logprobs_op.register_fake
def _(hidden, weight, bias, targets, mask, row_weight, spec):
    return _fake_outputs(LogprobSpec.decode_for_forward(spec), hidden, weight, bias)


@torch.library.custom_op("atesd_kernels::linear_topk_divergence", mutates_args=())
def linear_topk_divergence_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    targets: Tensor | None,
    spec: str,
) -> Outputs:
    options = TopkSpec.decode_for_forward(spec)
    vocab = _checked_vocab(options, student_hidden, student_weight, mask)
    checks.check_topk(teacher_ids, teacher_logprobs, mask, vocab, normalised=options.tail != "renormalise")
    if targets is not None:
        checks.check_targets(targets, mask, vocab)
    run = _backend(options.backend, "topk_rows")
    tensors = (student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs, mask, row_weight, targets)
    return _outputs(options, run(options, *tensors), row_weight)


@linear_topk_divergence_op.register_fake
def _(
    student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs, mask, row_weight, targets, spec
):  # fmt: skip
    return _fake_outputs(TopkSpec.decode_for_forward(spec), student_hidden, student_weight, student_bias)


@torch.library.custom_op("atesd_kernels::exposure_means", mutates_args=())
def exposure_means_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Tensor,
    exposed: Tensor,
    mask: Tensor,
    spec: str,
) -> Tensor:
    checks.check_targets(targets, mask, weight.shape[0])
    from .backends.triton_exposure import exposure_means

    return exposure_means(LogprobSpec.decode(spec), hidden, weight, bias, targets, lengths, exposed, mask)


@exposure_means_op.register_fake
def _(hidden, weight, bias, targets, lengths, exposed, mask, spec):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("atesd_kernels::divergence", mutates_args=())
def divergence_op(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, targets: Tensor | None, spec: str
) -> Outputs:
    """Divergence of given logits `[N, V]`. `hidden_grad` of spec and outputs refers to the student's logits."""
    options = DivergenceSpec.decode(spec)
    if targets is not None:
        checks.check_targets(targets, mask, student_logits.shape[1])
    run = _backend(options.backend, "divergence_logits")
    return _outputs(options, run(options, student_logits, teacher_logits, mask, None, targets), None)[:3]


@divergence_op.register_fake
def _(student_logits, teacher_logits, mask, targets, spec):
    return _fake_outputs(DivergenceSpec.decode(spec), student_logits, None, None)[:3]


@torch.library.custom_op("atesd_kernels::topk_divergence", mutates_args=())
def topk_divergence_op(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    spec: str,
) -> Outputs:
    """As `divergence_op`, against the teacher's top entries `[N, K]`."""
    options, vocab = TopkSpec.decode(spec), student_logits.shape[1]
    checks.check_topk(teacher_ids, teacher_logprobs, mask, vocab, normalised=options.tail != "renormalise")
    if targets is not None:
        checks.check_targets(targets, mask, vocab)
    run = _backend(options.backend, "topk_logits")
    result = run(options, student_logits, teacher_ids, teacher_logprobs, mask, None, targets)
    return _outputs(options, result, None)[:3]


@topk_divergence_op.register_fake
def _(student_logits, teacher_ids, teacher_logprobs, mask, targets, spec):
    return _fake_outputs(TopkSpec.decode(spec), student_logits, None, None)[:3]


def last_use() -> bool:
    """Whether the current backward pass frees its graph. If so, saved tensors may be overwritten."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not torch.compiler.is_compiling() and not keeps()


def times(grad: Tensor, scale: Tensor) -> Tensor:
    """Returns `grad * scale`, in place if the graph is freed. `scale` is a scalar, or `[N, 1]` for rows.

    Never overwrites batched gradients (functorch's): one tensor serves several backward passes.
    """
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(scale) or functorch.is_legacy_batchedtensor(scale)
    if batched or not last_use():
        if scale.dim() == 0 and grad.is_cuda:  # a GPU would round a 0-dim scale to grad's dtype
            return (grad * scale.reshape([1] * grad.dim())).to(grad.dtype)
        return grad * scale
    grad = grad.detach()
    on_gpu = grad.is_cuda and grad.dtype != torch.float64 and planning.HAS_TRITON and type(grad) is Tensor
    if scale.dim() == 0 and on_gpu:
        return elementwise.scale_(grad, scale)
    return grad.mul_(scale)


def saveable(tensor: Tensor) -> Tensor:
    """Returns `tensor`, or a copy if it was made in inference mode: autograd refuses to save such a tensor."""
    return tensor.clone() if tensor.is_inference() else tensor


def _tensors(inputs) -> Iterator[tuple[tuple[int, int | None], Tensor]]:
    """Yields an operator's tensors and their positions: the input, and the place in it if it is a list."""
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor):
            yield (i, None), value
        elif isinstance(value, (list, tuple)):
            yield from (((i, j), tensor) for j, tensor in enumerate(value) if tensor is not None)


def _register_autograd(op, spec_type: type[LossSpec], differentiable: tuple[str, ...]) -> None:
    """Registers the backward pass of an operator. Its outputs from the third on are the gradients of the inputs named
    `differentiable`: hidden states, and weight and bias if it has them."""
    names = [argument.name for argument in op._opoverload._schema.arguments]
    where = {name: names.index(name) for name in names}

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        spec = spec_type.decode(inputs[where["spec"]])
        ctx.wanted = (spec.hidden_grad, spec.weight_grad, spec.bias_grad)
        ctx.weighted = spec.weighted
        ctx.dtypes = {n: inputs[where[n]].dtype for n in differentiable if inputs[where[n]] is not None}
        # spec of the operator's second run, in backward; None if forward computed the gradients
        ctx.again = replace(spec, weighted=True, stats=False).encode() if spec.runs_again else None
        ctx.lists = {i: len(v) for i, v in enumerate(inputs) if isinstance(v, (list, tuple))}
        # autograd flattens a list of tensors: it expects a gradient, or None, for each
        ctx.flattened = {i: n for i, n in ctx.lists.items() if all(isinstance(t, Tensor) for t in inputs[i])}
        kept = {p: saveable(t) for p, t in _tensors(inputs)} if spec.runs_again else {}
        ctx.tensor_positions = list(kept)
        ctx.save_for_backward(*kept.values(), *([] if spec.runs_again else output[2:]))

    def backward(ctx, grads):
        upstream, *others = grads
        if any(g is not None for g in others):
            raise RuntimeError(
                f"{op._qualname} has no second derivative: its gradients are constants to autograd. Call backward() "
                "without create_graph=True, or use atesd_kernels.reference for double backward on small inputs."
            )
        result = [[None] * ctx.flattened[i] if i in ctx.flattened else None for i in range(len(names))]
        if upstream is None:
            return tuple(result)
        if ctx.again is not None:
            arguments = [[None] * ctx.lists[i] if i in ctx.lists else None for i in range(len(names))]
            for (i, j), tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
                if j is None:
                    arguments[i] = tensor
                else:
                    arguments[i][j] = tensor
            arguments[where["row_weight"]], arguments[where["spec"]] = upstream.contiguous(), ctx.again
            formed = op(*arguments)[2:]
        else:
            formed = ctx.saved_tensors
            scale = upstream if ctx.weighted else upstream[:, None]
        for name, grad, wanted in zip(differentiable, formed, ctx.wanted, strict=False):
            if wanted:
                if ctx.again is None:
                    grad = times(grad, scale)
                result[where[name]] = grad.to(ctx.dtypes[name])
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)


_register_autograd(linear_divergence_op, DivergenceSpec, ("student_hidden", "student_weight", "student_bias"))
_register_autograd(linear_divergence_views_op, DivergenceSpec, ("student_hidden", "student_weight", "student_bias"))
_register_autograd(linear_logprobs_op, LogprobSpec, ("hidden", "weight", "bias"))
_register_autograd(divergence_op, DivergenceSpec, ("student_logits",))
_register_autograd(linear_topk_divergence_op, TopkSpec, ("student_hidden", "student_weight", "student_bias"))
_register_autograd(topk_divergence_op, TopkSpec, ("student_logits",))
