"""The public losses. Each checks its arguments (`arguments`), flattens them, runs its operator (`ops`) and reduces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import checks, ops, planning
from .arguments import (
    checked_compute_dtype,
    checked_divergence,
    checked_logprobs,
    flat_mask,
    flat_targets,
    gradients_wanted,
    teacher_bias_of,
)
from .divergences import DivergenceTerm
from .shards import replicated_tensor, shard_of
from .spec import DivergenceSpec, LogprobSpec, accumulate_dtype
from .stats import TokenStats
from .views import check_views, flat_mix, flat_states, local_views, mixed_biases, views_of

if TYPE_CHECKING:  # the overloads type the effect of `return_stats`; the definitions below document the options
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .options import DivergenceOptions, LinearDivergenceOptions, LogprobOptions


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor | None] | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearDivergenceOptions],
) -> Tensor: ...
@overload
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor | None] | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearDivergenceOptions],
) -> tuple[Tensor, TokenStats]: ...
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor | None] | None = None,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_mix: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    targets: Tensor | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence between teacher and student next-token distributions, computed from hidden states.

    The student's distribution is `q = softmax(student_hidden @ student_weight.T / temperature)`; the teacher's is `p`,
    likewise. The loss is the divergence of `p` and `q`, summed over the vocabulary. It is computed in chunks and
    materialises no `[tokens, vocab]` tensor. The teacher gets no gradient.

    Args:
        student_hidden: `[..., H]`, fp32, bf16, fp16, or fp64 (backend "torch"); at least one leading dimension.
        student_weight: `[V, H]`, the head as `nn.Linear` stores it, same dtype as the hidden states.
        teacher_hidden: `[..., H_t]`, same leading dimensions and dtype. Or a list of M such tensors, views of a
            teacher: the target's logits are then `sum_m w_m z_m / teacher_temperature`, each view's logits `z_m` with
            its softcap, and `TokenStats` describe this mixture. The sizes `H_t` may differ.
        teacher_weight: `[V, H_t]`. None, or the student's own tensor, means a shared head. Logit differences then come
            from differences of hidden states; this keeps bf16 gradients accurate. Separate heads use fp32 logits (fp64
            for fp32 inputs). Backend "torch" and its faster forms make an exception of fp32 heads that are near: no row
            differs by more than 1/256 of the median row's norm. They multiply the differences of states and of heads
            instead, in fp32. This is for one teacher without biases or `group`. For views: one for all, or a list of M
            heads or None. Without softcap, views that all share the student's head cost one product, as one teacher
            does; otherwise each view costs a product.
        divergence: "forward_kl" KL(p||q), "reverse_kl" KL(q||p), "jsd", "jeffreys", "skew_kl", "skew_reverse_kl",
            "total_variation", "alpha", or a `DivergenceTerm`. See `divergences.py` for the formulas.
        beta: shape of "jsd", "skew_*" and "alpha", in [0, 1]. For "jsd" as in TRL and Liger: 0 is forward KL, 1 is
            reverse KL, between them `beta KL(p||m) + (1-beta) KL(q||m)` with `m = beta p + (1-beta) q`.
        temperature: divides both models' logits. No T^2 factor is applied to the loss (OPSD applies none).
        teacher_temperature: divides the teacher's logits, if it differs.
        student_bias, teacher_bias: `[V]`, added to the logits. An entry at -inf in both is excluded from the
            vocabulary. With a shared head, the teacher's bias defaults to the student's. For views: one teacher's bias
            for all, or a list of M biases or None. They mix like logits. An entry that one view excludes is excluded
            from the vocabulary, whatever the view's weight.
        teacher_mix: `[M]` or `[M, ...]` (for each token), floating: the views' weights `w_m`, without gradient. They
            may be negative. Required for a list of views, and refused without one. The weights of an unmasked token
            are finite and sum to 1 within 1e-6 (on a GPU this is the caller's promise); they are divided by their sum.
            `README.md` lists published targets of this form.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature, as in Gemma. A logit of -inf
            stays there.
        mask: `[...]`, bool or 0/1; tokens where it is false cost nothing and do not affect the loss.
        token_weight: `[...]`, a constant factor per token, without gradient. The mean's denominator ignores it.
        targets: `[...]` int, sampled tokens, for the log-probabilities in `TokenStats`.
        entry_clip: upper bound on each (token, vocabulary entry) term before the sum, as in OPSD. A clipped term has
            zero gradient. The loss may then be negative, because terms of a KL may.
        token_clip: upper bound on each token's divergence; a clipped token has no gradient.
        reduction: "mean" over unmasked tokens, "sum", or "none" (per-token values, zero where masked).
        num_tokens: a positive number, or a tensor of one, that replaces the mean's denominator, for gradient
            accumulation and for data or context parallelism.
            Each rank passes its rows and the count over all ranks. The sum of the losses over ranks is then the loss of
            the global batch. A rank's hidden states get the gradient of its rows. Gradients of weights must be summed:
            if a wrapper averages them over P ranks (DDP, FSDP), multiply the loss by P.
        backend: "auto", "torch", "cpp" (on a CPU, with a C++ compiler: what "auto" takes for large calls),
            "torch_compiled" (Inductor compiles the elementwise passes of "torch"), "triton", or "module:object" for a
            `backends.Backend` of your own.
        chunk_bytes: budget for the chunk of logits, the only vocabulary-sized temporary. Our choice: 128 MiB on a CPU.
            On a GPU, "torch" takes 1 GiB. "triton" takes 1,024 to 2,047 rows, or 4,096 to 8,191 with a trained head,
            within an eighth of the GPU's memory.
        logits_dtype: dtype of the student's logits, and of separate teacher logits. bf16 is faster on a GPU. It adds
            an error of 1.4 to 3 % to the gradient.
        group: process group over which the heads' rows are sharded. Each rank passes its rows (`[V_rank, H]`, any
            number, in rank order), its entries of the biases, and the same hidden states, mask, options and (global)
            targets. For backend "triton" the ranks' GPUs are of one kind: the number of multiprocessors decides how
            rows are split. A call that differs is an error on every rank where a sample shows it (values of one row,
            the number of unmasked tokens, a checksum of the options). Every rank must call backward. Ranks exchange a
            few numbers per token and all-reduce the hidden states' gradient. Every rank gets the full loss, the full
            gradient of the hidden states, and its shard of the head's gradient. A `DTensor` head sharded by its rows
            supplies its own group.
        return_stats: also return `TokenStats`.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or `[...]` for `reduction="none"`. With `return_stats`, a pair
        of it and `TokenStats`. Without unmasked tokens the loss is 0, with zero gradients. Non-finite hidden states
        give a non-finite loss.

    Raises:
        ValueError, TypeError: before any computation. The message gives the argument, the value seen and what to do.

    Example:
        >>> import torch
        >>> from atesd_kernels import linear_divergence
        >>> _ = torch.manual_seed(0)
        >>> head = torch.randn(1000, 64) * 0.1
        >>> student = torch.randn(2, 5, 64, requires_grad=True)
        >>> teacher = student.detach() + 0.1 * torch.randn(2, 5, 64)
        >>> loss = linear_divergence(student, head, teacher, divergence="forward_kl", temperature=1.1)
        >>> loss.backward()
        >>> round(loss.item(), 3), tuple(student.grad.shape)
        (0.003, (2, 5, 64))
    """
    views = views_of(student_weight, teacher_hidden, teacher_weight, teacher_bias, teacher_mix)
    student_hidden = replicated_tensor("student_hidden", student_hidden)
    student_weight, group = shard_of("student_weight", student_weight, group)
    student_bias, group = shard_of("student_bias", student_bias, group)
    views, group = local_views(views, group)
    checks.check_head("student", student_hidden, student_weight, student_bias)
    check_views(student_hidden, student_weight, views)
    lead = student_hidden.shape[:-1]
    compute_dtype = checked_compute_dtype(
        student_hidden,
        logits_dtype,
        student_weight=student_weight,
        **{f"teacher_weight{view.label}": view.weight for view in views},
    )
    call = checked_divergence(
        lead, student_hidden.device, compute_dtype, divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, softcap=softcap, mask=mask, token_weight=token_weight, targets=targets,
        entry_clip=entry_clip, token_clip=token_clip, reduction=reduction, num_tokens=num_tokens,
        backend=backend, vocab=len(student_weight), chunk_bytes=chunk_bytes,
    )  # fmt: skip
    checks.check_group(group, call.options["backend"])
    states = [flat_states(view, lead.numel()) for view in views]
    heads = [None if view.weight is None else view.weight.detach() for view in views]
    teacher: tuple[Any, ...]
    if teacher_mix is None:
        op, teacher = ops.linear_divergence_op, (states[0], heads[0], teacher_bias_of(views[0], student_bias))
    else:
        planning.require_views(call.options["backend"])
        mix = flat_mix(teacher_mix, len(views), lead, student_hidden.device, call.mask)
        student_bias, bias = mixed_biases(views, student_weight, student_bias)
        op, teacher = ops.linear_divergence_views_op, (states, heads, bias, mix)
    spec = DivergenceSpec(
        **call.options,
        logits_dtype=logits_dtype,
        compute_dtype=compute_dtype,
        group=None if group is None else group.group_name,
        stats=return_stats,
        weighted=reduction != "none",
        **gradients_wanted(student_hidden, student_weight, student_bias),
    )
    value, stats, *_ = op(
        student_hidden.reshape(lead.numel(), student_hidden.shape[-1]),
        student_weight,
        student_bias,
        *teacher,
        call.mask,
        None if reduction == "none" else call.row_weight,
        call.targets,
        spec.encode(),
    )
    loss = _per_token(value, call.row_weight, lead) if reduction == "none" else value
    return (loss, _stats(stats, lead, targets is not None)) if return_stats else loss


@overload
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor: ...
@overload
def divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, return_stats: Literal[True], **options: Unpack[DivergenceOptions]
) -> tuple[Tensor, TokenStats]: ...
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    targets: Tensor | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """`linear_divergence` for given logits, `[..., V]` each. It has the same options and results.

    Arithmetic is fp32 for every logits dtype, but it cannot recover digits that bf16 logits have lost: prefer
    `linear_divergence`. It needs `chunk_bytes` of memory, and the gradient, which is as large as the logits.

    Example:
        >>> import torch
        >>> from atesd_kernels import divergence
        >>> divergence(torch.zeros(3, 10), torch.zeros(3, 10)).item()
        0.0
    """
    checks.check_tensor("student_logits", student_logits)
    checks.check_tensor("teacher_logits", teacher_logits)
    checks.require(
        student_logits.dim() >= 2, lambda: f"student_logits must be [..., V], got {tuple(student_logits.shape)}."
    )
    checks.check_pair(student_logits, teacher_logits, "logits")
    checks.check_vocabulary(student_logits.shape[-1], teacher_logits.shape[-1])
    checks.require(
        student_logits.dtype in checks.FLOATS,
        lambda: f"logits must be floating, got {student_logits.dtype}.",
        TypeError,
    )
    lead = student_logits.shape[:-1]
    call = checked_divergence(
        lead, student_logits.device, student_logits.dtype, divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, softcap=softcap, mask=mask, token_weight=token_weight, targets=targets,
        entry_clip=entry_clip, token_clip=token_clip, reduction=reduction, num_tokens=num_tokens, backend=backend,
        vocab=student_logits.shape[-1], chunk_bytes=chunk_bytes,
    )  # fmt: skip
    spec = DivergenceSpec(
        **call.options,
        logits_dtype=accumulate_dtype(student_logits.dtype),
        compute_dtype=student_logits.dtype,
        stats=return_stats,
        **gradients_wanted(student_logits),
    )
    value, stats, _ = ops.divergence_op(
        student_logits.reshape(lead.numel(), student_logits.shape[-1]),
        teacher_logits.detach().reshape(lead.numel(), teacher_logits.shape[-1]),
        call.mask,
        call.targets,
        spec.encode(),
    )
    loss = _per_token(value, call.row_weight, lead)
    loss = loss if reduction == "none" else loss.sum()
    return (loss, _stats(stats, lead, targets is not None)) if return_stats else loss


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LogprobOptions],
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: Unpack[LogprobOptions]
) -> tuple[Tensor, TokenStats]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Log-probability of each target token, differentiable. It materialises no `[tokens, vocab]` tensor.

    Args:
        hidden: `[..., H]`; the state that predicts `targets[...]` (shift before the call).
        weight: `[V, H]`; bias: `[V]`; softcap, temperature, chunk_bytes, logits_dtype: as in `linear_divergence`.
        targets: `[...]` int in [0, V). Masked positions may have any value, such as -100.
        mask: `[...]`; masked tokens cost nothing and return 0.
        group: as in `linear_divergence`, for a head whose rows are sharded.
        return_stats: also return `TokenStats` with the student's fields; the teacher's are None.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), in nats. Backward is exact for arbitrary upstream gradients.

    Raises:
        ValueError, TypeError: before any computation.

    Example:
        >>> import torch
        >>> from atesd_kernels import linear_logprobs
        >>> hidden, head = torch.zeros(1, 4, 8), torch.zeros(100, 8)
        >>> linear_logprobs(hidden, head, torch.tensor([[1, 2, 3, 4]])).exp()
        tensor([[0.0100, 0.0100, 0.0100, 0.0100]])
    """
    hidden = replicated_tensor("hidden", hidden)
    weight, group = shard_of("weight", weight, group)
    bias, group = shard_of("bias", bias, group)
    lead = hidden.shape[:-1]
    options = checked_logprobs(
        hidden, weight, targets, mask=mask, temperature=temperature, bias=bias, softcap=softcap,
        backend=backend, chunk_bytes=chunk_bytes, logits_dtype=logits_dtype,
    )  # fmt: skip
    checks.check_group(group, options["backend"])
    spec = LogprobSpec(
        **options,
        group=None if group is None else group.group_name,
        stats=return_stats,
        **gradients_wanted(hidden, weight, bias),
    )
    value, stats, *_ = ops.linear_logprobs_op(
        hidden.reshape(lead.numel(), hidden.shape[-1]),
        weight,
        bias,
        flat_targets(targets),
        flat_mask(mask),
        None,
        spec.encode(),
    )
    value = value.reshape(lead)
    if not return_stats:
        return value
    stats = _stats(stats, lead, True)
    return value, stats._replace(teacher_entropy=None, teacher_logprob=None, top1_agree=None)


def _per_token(value: Tensor, row_weight: Tensor | None, lead: torch.Size) -> Tensor:
    return (value if row_weight is None else value * row_weight).reshape(lead)


def _stats(stats: Tensor, lead: torch.Size, has_targets: bool) -> TokenStats:
    shaped = stats.detach().reshape(len(TokenStats._fields), *lead)
    fields: dict[str, Tensor | None] = dict(zip(TokenStats._fields, shaped.unbind(0), strict=True))
    fields["top1_agree"] = shaped[TokenStats._fields.index("top1_agree")] > 0
    if not has_targets:
        fields["student_logprob"] = fields["teacher_logprob"] = None
    return TokenStats(**fields)  # type: ignore[arg-type]
