"""The loss against a teacher of which only the top K entries are known, such as one behind a server."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import checks, ops, planning
from .arguments import (
    checked_compute_dtype,
    flat_mask,
    flat_targets,
    gradients_wanted,
    plain_numbers,
    row_weight_of,
)
from .divergences import DivergenceTerm, get_divergence
from .losses import _per_token, _stats
from .shards import replicated_tensor, shard_of
from .spec import TopkSpec, accumulate_dtype
from .stats import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .options import LinearTopkDivergenceOptions, TopkDivergenceOptions


@overload
def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearTopkDivergenceOptions],
) -> Tensor: ...
@overload
def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearTopkDivergenceOptions],
) -> tuple[Tensor, TokenStats]: ...
def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logits_dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    targets: Tensor | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence between a teacher known by its top K entries and the student, from the student's hidden states.

    The student's distribution is `q = softmax(student_hidden @ student_weight.T / temperature)`, over the whole
    vocabulary. It is computed in chunks and materialises no `[tokens, vocab]` tensor. With `tail="bucket"` all entries
    outside the K ids are one more entry, the rest, on both sides. Merging entries never increases an f-divergence, so
    without a clip the loss is a lower bound of `linear_divergence`, never negative, and equal to it where the ids cover
    the vocabulary. The gradient reaches every logit of the student.

    Args:
        student_hidden: `[..., H]`, fp32, bf16, fp16, or fp64 (backend "torch"); at least one leading dimension.
        student_weight: `[V, H]`, the head as `nn.Linear` stores it, same dtype as the hidden states.
        teacher_ids: `[..., K]` int, in any order, K > 0. -1 pads a token that has fewer entries.
        teacher_logprobs: `[..., K]`, any floating dtype, in nats, normalised over the whole vocabulary. They are used
            as given: no temperature divides them. Places whose id is -1 may hold anything. No gradient.
        divergence, beta: as in `linear_divergence`; every divergence runs on every backend here.
        tail: what becomes of the teacher's mass outside the ids.
            "bucket": the rest of both distributions is one more entry. The student's rest is summed over its entries.
            The teacher's is 1 minus its mass, and at least 1e-6 (our choice: less is noise in fp32 log-probs); the
            K + 1 entries are then normalised. There is no rest where the ids cover the student's vocabulary.
            "renormalise": both distributions over the K ids only. Constants in `teacher_logprobs` cancel, so they may
            be logits, or log-probs divided by a temperature. The gradient is zero outside the ids.
            "ignore": the sum over the K ids, as in verl and other libraries. It is no divergence and can be negative;
            kept for comparison.
        temperature: divides the student's logits.
        student_bias: `[V]`, added to the logits. An entry at -inf is excluded from the vocabulary.
        softcap, mask, token_weight, token_clip, reduction, num_tokens, chunk_bytes: as in `linear_divergence`. Masked
            tokens may hold any ids and log-probs.
        logits_dtype: dtype of the student's logits. As for separate heads, fp32 inputs take fp64 products by default.
        targets: `[...]` int, sampled tokens, for the log-probabilities in `TokenStats`.
        entry_clip: upper bound on each of the K + 1 terms before the sum. A clipped term has zero gradient.
        backend: "auto", "torch", "torch_compiled", "triton", or "module:object" whose object has a function `topk_rows`
            (see `atesd_kernels.backends.TopkBackend`).
        group: as in `linear_divergence`, for a head whose rows are sharded. Ids number the whole vocabulary.
        return_stats: also return `TokenStats`. The student's fields are those of its whole distribution.
            `teacher_entropy` is that of the K + 1 entries (of the K with "renormalise"). `teacher_logprob` is the given
            one, NaN where the target is not listed. `top1_agree` compares with the teacher's best listed id.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or `[...]` for `reduction="none"`. With `return_stats`, a pair
        of it and `TokenStats`. A token without listed entries has the loss 0.

    Raises:
        ValueError, TypeError: before any computation. Also for repeated ids, ids below -1 or of V or more, NaN, and
            a mass above 1 + 1e-4 (except with "renormalise"). On a GPU these four are the caller's promise, because
            reading values would synchronise.

    Example:
        >>> import torch
        >>> from atesd_kernels import linear_topk_divergence
        >>> _ = torch.manual_seed(0)
        >>> head = torch.randn(1000, 64) * 0.1
        >>> student = torch.randn(2, 5, 64, requires_grad=True)
        >>> teacher = student.detach() + 0.1 * torch.randn(2, 5, 64)
        >>> logprobs, ids = (teacher @ head.T).log_softmax(-1).topk(16)  # what a server sends
        >>> loss = linear_topk_divergence(student, head, ids, logprobs)
        >>> loss.backward()
        >>> bool(loss > 0), tuple(student.grad.shape)
        (True, (2, 5, 64))
    """
    student_hidden = replicated_tensor("student_hidden", student_hidden)
    student_weight, group = shard_of("student_weight", student_weight, group)
    student_bias, group = shard_of("student_bias", student_bias, group)
    checks.check_head("student", student_hidden, student_weight, student_bias)
    lead = student_hidden.shape[:-1]
    compute_dtype = checked_compute_dtype(student_hidden, logits_dtype, student_weight=student_weight)
    spec, row_weight = _checked(
        lead, student_hidden.device, compute_dtype, "topk_rows", teacher_ids, teacher_logprobs, tail=tail, mask=mask,
        token_weight=token_weight, targets=targets, reduction=reduction, num_tokens=num_tokens, divergence=divergence,
        beta=beta, backend=backend, temperature=temperature, softcap=softcap, entry_clip=entry_clip,
        token_clip=token_clip, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    checks.check_group(group, spec.backend)
    spec = replace(
        spec,
        logits_dtype=logits_dtype,
        group=None if group is None else group.group_name,
        stats=return_stats,
        weighted=reduction != "none",
        **gradients_wanted(student_hidden, student_weight, student_bias),
    )
    value, stats, *_ = ops.linear_topk_divergence_op(
        student_hidden.reshape(lead.numel(), student_hidden.shape[-1]),
        student_weight,
        student_bias,
        *_flat_entries(lead, teacher_ids, teacher_logprobs),
        flat_mask(mask),
        None if reduction == "none" else row_weight,
        None if targets is None else flat_targets(targets),
        spec.encode(),
    )
    loss = _per_token(value, row_weight, lead) if reduction == "none" else value
    return (loss, _stats(stats, lead, targets is not None)) if return_stats else loss


@overload
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[TopkDivergenceOptions],
) -> Tensor: ...
@overload
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[TopkDivergenceOptions],
) -> tuple[Tensor, TokenStats]: ...
def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: str | DivergenceTerm = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
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
    """`linear_topk_divergence` for given student logits `[..., V]`. It has the same options and results.

    It needs `chunk_bytes` of memory, and the gradient, which is as large as the logits.

    Example:
        >>> import torch
        >>> from atesd_kernels import topk_divergence
        >>> logprobs, ids = torch.zeros(3, 10).log_softmax(-1).topk(4)
        >>> topk_divergence(torch.zeros(3, 10), ids, logprobs).item() < 1e-12
        True
    """
    checks.require(
        student_logits.dim() >= 2, lambda: f"student_logits must be [..., V], got {tuple(student_logits.shape)}."
    )
    checks.require(
        student_logits.dtype in checks.FLOATS,
        lambda: f"logits must be floating, got {student_logits.dtype}.",
        TypeError,
    )
    lead = student_logits.shape[:-1]
    spec, row_weight = _checked(
        lead, student_logits.device, student_logits.dtype, "topk_logits", teacher_ids, teacher_logprobs, tail=tail,
        mask=mask, token_weight=token_weight, targets=targets, reduction=reduction, num_tokens=num_tokens,
        divergence=divergence, beta=beta, backend=backend, temperature=temperature, softcap=softcap,
        entry_clip=entry_clip, token_clip=token_clip, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    value, stats, _ = ops.topk_divergence_op(
        student_logits.reshape(lead.numel(), student_logits.shape[-1]),
        *_flat_entries(lead, teacher_ids, teacher_logprobs),
        flat_mask(mask),
        None if targets is None else flat_targets(targets),
        replace(spec, stats=return_stats, **gradients_wanted(student_logits)).encode(),
    )
    loss = _per_token(value, row_weight, lead)
    loss = loss if reduction == "none" else loss.sum()
    return (loss, _stats(stats, lead, targets is not None)) if return_stats else loss


def _checked(
    lead: torch.Size, device, dtype, function: str, ids, logprobs, *, tail, mask, token_weight, targets, reduction,
    num_tokens, divergence, beta, backend, **numbers: float | None,
) -> tuple[TopkSpec, Tensor | None]:  # fmt: skip
    """Checks the options that both losses share. Returns them resolved, and the rows' factors in the loss.

    Raises:
        ValueError: also if a backend of the caller's own lacks `function`.
    """
    checks.check_topk_tensors(lead, device, ids, logprobs, tail)
    checks.check_token_tensors(lead, device, mask=mask, token_weight=token_weight, targets=targets)
    checks.check_scalars(reduction=reduction, **numbers)  # type: ignore[arg-type]
    # the K + 1 entries are compared in torch, so a term needs no Triton function
    backend = planning.choose_backend(backend, device, dtype, True)
    if ":" in backend and not torch.compiler.is_compiling():
        checks.require(
            callable(getattr(planning.own_backend(backend), function, None)),
            lambda: f"backend {backend!r} lacks {function}; see atesd_kernels.backends.TopkBackend.",
        )
    spec = TopkSpec(
        **plain_numbers(beta=beta, teacher_temperature=numbers["temperature"], **numbers),  # type: ignore[arg-type]
        divergence=get_divergence(divergence, beta).key,
        tail=tail,
        backend=backend,
        logits_dtype=accumulate_dtype(dtype),
        compute_dtype=dtype,
        stats=False,
    )
    return spec, row_weight_of(token_weight, mask, lead.numel(), device, dtype, reduction, num_tokens)


def _flat_entries(lead: torch.Size, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    shape = (lead.numel(), ids.shape[-1])
    return ids.reshape(shape), logprobs.detach().reshape(shape)
