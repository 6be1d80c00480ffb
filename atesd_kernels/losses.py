"""The public losses: check (`arguments`), flatten, run the operator (`ops`), reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import checks, ops
from .arguments import (
    checked_compute_dtype,
    checked_divergence,
    checked_logprobs,
    flat_mask,
    gradients_wanted,
    same_storage,
    teacher_bias_of,
)
from .divergences import DivergenceTerm
from .shards import backend_for, shard_of, whole
from .stats import TokenStats

if TYPE_CHECKING:  # the overloads say what `return_stats` changes; the definitions below say the rest
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .options import DivergenceOptions, LinearDivergenceOptions, LogprobOptions


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearDivergenceOptions],
) -> Tensor: ...
@overload
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearDivergenceOptions],
) -> tuple[Tensor, TokenStats]: ...
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    """Divergence between teacher and student next-token distributions, straight from hidden states.

    With `s = student_hidden @ student_weight.T / temperature`, `q = softmax(s)`, and likewise `p` for the teacher, the
    loss is the divergence of `p` and `q` summed over the vocabulary, computed in chunks: no `[tokens, vocab]` tensor
    ever exists. The teacher gets no gradient.

    Args:
        student_hidden: `[..., H]`, fp32, bf16, fp16, or fp64 (backend "torch"); at least one leading dimension.
        student_weight: `[V, H]`, the head as `nn.Linear` stores it, same dtype as the hidden states.
        teacher_hidden: `[..., H_t]`, same leading dimensions and dtype.
        teacher_weight: `[V, H_t]`. None, or the student's own tensor, is the shared head: logit differences are then
            computed from differences of hidden states, which is what keeps bf16 gradients right. Separate heads use
            fp32 logits (fp64 for fp32 inputs on backend "torch").
        divergence: "forward_kl" KL(p||q), "reverse_kl" KL(q||p), "jsd", "jeffreys", "skew_kl", "skew_reverse_kl",
            "total_variation", "alpha", or a `DivergenceTerm`. See `divergences.py` for the formulas.
        beta: shape of "jsd", "skew_*" and "alpha", in [0, 1]. For "jsd" as in TRL and Liger: 0 is forward KL, 1 is
            reverse KL, between them `beta KL(p||m) + (1-beta) KL(q||m)` with `m = beta p + (1-beta) q`.
        temperature: divides both models' logits. No T^2 factor is applied to the loss (OPSD applies none).
        teacher_temperature: the teacher's, if it differs.
        student_bias, teacher_bias: `[V]`, added to the logits. An entry at -inf on both sides does not exist. With a
            shared head the teacher uses the student's bias unless given its own.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature, as in Gemma.
        mask: `[...]`, bool or 0/1; tokens where it is false cost nothing and have no influence.
        token_weight: `[...]`, a constant factor per token (it gets no gradient); the mean's denominator ignores it.
        targets: `[...]` int, sampled tokens, for the log-probabilities in `TokenStats`.
        entry_clip: upper bound on each (token, vocabulary entry) term before the sum, as OPSD does; the gradient of a
            clipped entry's term is zero. The loss may then be negative, because terms of a KL may.
        token_clip: upper bound on each token's divergence; a clipped token has no gradient.
        reduction: "mean" over counted tokens, "sum", or "none" (per-token values, zero where masked).
        num_tokens: replaces the mean's denominator: for gradient accumulation, and for rows spread over ranks (data or
            context parallelism). Each rank passes its rows and the count over all ranks. The losses then add up over
            ranks to the whole batch's, the gradient of a rank's hidden states is that of its rows, and gradients of
            weights are to be summed: where a wrapper averages them over P ranks (DDP, FSDP), multiply the loss by P.
        backend: "auto", "torch", "torch_compiled" (its elementwise passes through Inductor: faster after a wait for the
            compiler), "triton".
        chunk_bytes: budget for the chunk of logits, the only vocabulary-sized temporary. Our choice: 128 MiB on a CPU.
            On a GPU what 1,024 to 2,047 rows take, 4,096 to 8,191 with a trained head, but at most an eighth of its
            memory ("triton"); 1 GiB ("torch").
        logits_dtype: of the student's logits (and of separate teacher logits). bf16 is faster and costs 2 to 3 % of
            the gradient.
        group: the process group over which the heads' rows are sharded, for backend "torch" only. Each rank passes its
            rows (`[V_rank, H]`, any number, in the order of ranks), its entries of the biases, and the same hidden
            states, options and (global) targets, and takes part in each backward; ranks exchange a few numbers a token
            and the hidden states' gradient. Every rank gets the whole loss, the whole gradient of the hidden states,
            and its share of the head's. A head that is a `DTensor` sharded by its rows names its group itself.
        return_stats: also return `TokenStats`.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or `[...]` for `reduction="none"`. With `return_stats`, the
        pair of it and `TokenStats`. All tokens masked, or none given: 0, with zero gradients. Non-finite hidden states
        give a non-finite loss; they are not hidden.

    Raises:
        ValueError, TypeError: before any computation, naming the argument, the value seen and what to do.

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
    if teacher_weight is not None and same_storage(student_weight, teacher_weight):
        teacher_weight = None
    student_hidden, teacher_hidden = whole("student_hidden", student_hidden), whole("teacher_hidden", teacher_hidden)
    student_weight, group = shard_of("student_weight", student_weight, group)
    teacher_weight, group = shard_of("teacher_weight", teacher_weight, group)
    student_bias, group = shard_of("student_bias", student_bias, group)
    teacher_bias, group = shard_of("teacher_bias", teacher_bias, group)
    checks.check_head("student", student_hidden, student_weight, student_bias)
    checks.check_pair(student_hidden, teacher_hidden, "hidden")
    checks.check_head(
        "teacher", teacher_hidden, student_weight if teacher_weight is None else teacher_weight, teacher_bias
    )
    if teacher_weight is not None:
        checks.check_vocabulary(student_weight.shape[0], teacher_weight.shape[0])
    lead = student_hidden.shape[:-1]
    compute_dtype = checked_compute_dtype(
        student_hidden, logits_dtype, student_weight=student_weight, teacher_weight=teacher_weight
    )
    call = checked_divergence(
        lead, student_hidden.device, compute_dtype, divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, softcap=softcap, mask=mask, token_weight=token_weight, targets=targets,
        entry_clip=entry_clip, token_clip=token_clip, reduction=reduction, num_tokens=num_tokens,
        backend=backend_for(group, backend), chunk_bytes=chunk_bytes,
    )  # fmt: skip
    checks.check_group(group, call.backend)
    value, stats, *_ = ops.linear_divergence_op(
        student_hidden.reshape(lead.numel(), student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(lead.numel(), teacher_hidden.shape[-1]),
        None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias_of(teacher_weight, teacher_bias, student_bias),
        call.mask,
        None if reduction == "none" else call.row_weight,
        call.targets,
        *call.options,
        logits_dtype,
        compute_dtype,
        chunk_bytes,
        None if group is None else group.group_name,
        return_stats,
        reduction != "none",
        *gradients_wanted(student_hidden, student_weight, student_bias),
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
    """`linear_divergence` for those who already hold logits, `[..., V]` each; the same options, same results.

    The arithmetic is fp32 whatever the logits' dtype, but digits that bf16 logits have lost stay lost: prefer
    `linear_divergence`. Beside the gradient, which has the logits' size, memory is `chunk_bytes`.

    Example:
        >>> import torch
        >>> from atesd_kernels import divergence
        >>> divergence(torch.zeros(3, 10), torch.zeros(3, 10)).item()
        0.0
    """
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
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    value, stats, _ = ops.divergence_op(
        student_logits.reshape(lead.numel(), student_logits.shape[-1]),
        teacher_logits.detach().reshape(lead.numel(), teacher_logits.shape[-1]),
        call.mask,
        call.targets,
        *call.options,
        chunk_bytes,
        return_stats,
        *gradients_wanted(student_logits),
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
    """Log-probability of each target token, differentiable, without a `[tokens, vocab]` tensor.

    Args:
        hidden: `[..., H]`; the state that predicts `targets[...]` (shift before the call).
        weight: `[V, H]`; bias: `[V]`; softcap, temperature, chunk_bytes, logits_dtype: as in `linear_divergence`.
        targets: `[...]` int in [0, V). Masked positions may hold anything, such as -100.
        mask: `[...]`; masked tokens cost nothing and return 0.
        group: as in `linear_divergence`, for a head whose rows are sharded.
        return_stats: also return `TokenStats` with the student's fields; the teacher's are None.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), in nats. Arbitrary upstream gradients are exact.

    Raises:
        ValueError, TypeError: before any computation.

    Example:
        >>> import torch
        >>> from atesd_kernels import linear_logprobs
        >>> hidden, head = torch.zeros(1, 4, 8), torch.zeros(100, 8)
        >>> linear_logprobs(hidden, head, torch.tensor([[1, 2, 3, 4]])).exp()
        tensor([[0.0100, 0.0100, 0.0100, 0.0100]])
    """
    hidden = whole("hidden", hidden)
    weight, group = shard_of("weight", weight, group)
    bias, group = shard_of("bias", bias, group)
    lead = hidden.shape[:-1]
    backend, compute_dtype = checked_logprobs(
        hidden, weight, targets, mask=mask, temperature=temperature, bias=bias, softcap=softcap,
        backend=backend_for(group, backend), chunk_bytes=chunk_bytes, logits_dtype=logits_dtype,
    )  # fmt: skip
    checks.check_group(group, backend)
    value, stats, *_ = ops.linear_logprobs_op(
        hidden.reshape(lead.numel(), hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        flat_mask(mask),
        None,
        backend,
        float(temperature),
        softcap,
        logits_dtype,
        compute_dtype,
        chunk_bytes,
        None if group is None else group.group_name,
        return_stats,
        False,
        *gradients_wanted(hidden, weight, bias),
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
