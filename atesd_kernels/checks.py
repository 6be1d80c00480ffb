"""Input checks. All run before any GEMM; messages give the fault, the value seen and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .planning import BACKENDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def require(condition: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raises `error(message())` if `condition` is false. A function, as torch.compile cannot format symbolic sizes."""
    if not condition:
        raise error(message())


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, view: str = "") -> None:
    """Checks shapes, devices and floating dtypes of `hidden` `[..., H]`, `weight` `[V, H]` and `bias` `[V]`. `view` is
    a suffix of their names, such as "[1]"."""
    states, head, shift = (f"{name}_{part}{view}" for part in ("hidden", "weight", "bias"))
    require(
        hidden.dim() >= 2,
        lambda: f"{states} must be [..., H] with a leading dimension, got {tuple(hidden.shape)}; use hidden[None].",
    )
    require(weight.dim() == 2, lambda: f"{head} must be [V, H], got {tuple(weight.shape)}.")
    require(
        hidden.shape[-1] == weight.shape[1],
        lambda: (
            f"{states} has size {hidden.shape[-1]}, but {head} is [V, H] = {tuple(weight.shape)}; "
            "pass the head's weight as nn.Linear stores it."
        ),
    )
    for label, tensor in ((states, hidden), (head, weight), (shift, bias)):
        if tensor is None:
            continue
        require(tensor.dtype in FLOATS, lambda: f"{label} has dtype {tensor.dtype}; use one of {FLOATS}.", TypeError)
        require(
            tensor.device == hidden.device,
            lambda: f"{label} is on {tensor.device}, {states} on {hidden.device}; move them together.",
        )
    if bias is not None:
        require(
            bias.shape == weight.shape[:1],
            lambda: f"{shift} must be [V] = [{weight.shape[0]}], got {tuple(bias.shape)}.",
        )


def check_pair(student: Tensor, teacher: Tensor, what: str, view: str = "") -> None:
    """Checks that leading dimensions, dtype and device of the two models' inputs agree."""
    named = f"teacher_{what}{view}"
    require(
        student.shape[:-1] == teacher.shape[:-1],
        lambda: (
            f"student_{what} and {named} must have the same leading dimensions, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; both must hold the response tokens, in the same order."
        ),
    )
    require(
        student.dtype == teacher.dtype or torch.is_autocast_enabled(student.device.type),
        lambda: f"student_{what} is {student.dtype}, {named} {teacher.dtype}; cast one of them.",
        TypeError,
    )
    require(
        student.device == teacher.device,
        lambda: f"student_{what} is on {student.device}, {named} on {teacher.device}; move them together.",
    )


def check_vocabulary(student: int, teacher: int) -> None:
    require(
        student == teacher,
        lambda: (
            f"student and teacher vocabularies differ: {student} and {teacher} entries. If one is padded, cut its head "
            "to the common tokens (weight[:V]), or extend the other with rows whose bias is -inf."
        ),
    )


def check_num_tokens(num_tokens: int | float) -> None:
    require(num_tokens > 0, lambda: f"num_tokens must be positive, got {num_tokens}; skip a step without tokens.")
    require(num_tokens < math.inf, lambda: "num_tokens must be finite, got inf; pass the number of tokens that count.")


def check_one_number(name: str, value: Any) -> None:
    """Checks that `value` is a Python or numpy number, or a tensor or array of one number."""
    numel = getattr(value, "size", 1) if not isinstance(value, Tensor) else value.numel()
    require(
        isinstance(value, (int, float)) or (hasattr(value, "item") and numel == 1),
        lambda: f"{name} must be one number, got {type(value).__name__} {value!r}.",
        TypeError,
    )


def check_tensor(name: str, value: Any) -> None:
    """Checks that a head, hidden states or logits are a tensor: the layer itself is an easy slip for its weight."""
    require(
        isinstance(value, Tensor),
        lambda: (
            f"{name} must be a tensor, got {type(value).__name__}; "
            f"pass {'its .weight' if isinstance(value, torch.nn.Module) else 'the tensor itself'}."
        ),
        TypeError,
    )


INTEGER_TENSORS = ("targets", "lengths", "exposed")


def check_token_tensors(lead: torch.Size, device: torch.device, **tensors: Tensor | None) -> None:
    """Checks tensors with one value per token (or sequence): shape, device, and integer dtype where required."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require(
            isinstance(tensor, Tensor),
            lambda: f"{name} must be a tensor, got {type(tensor).__name__}; pass torch.as_tensor({name}).",
            TypeError,
        )
        require(
            tensor.shape == lead,
            lambda: f"{name} must have the leading shape {tuple(lead)}, got {tuple(tensor.shape)}.",
        )
        require(tensor.device == device, lambda: f"{name} is on {tensor.device}, the hidden states on {device}.")
        require(
            name not in INTEGER_TENSORS or not (tensor.is_floating_point() or tensor.dtype == torch.bool),
            lambda: f"{name} must be integers, got {tensor.dtype}.",
            TypeError,
        )


def check_spans(lengths: Tensor, exposed: Tensor, max_length: int) -> None:
    """Checks that spans lie in `[0, max_length]`. Skipped on a GPU and while torch.compile traces."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not lengths.numel():
        return
    low, high = lengths.min().item(), lengths.max().item()
    require(
        low >= 0 and high <= max_length,
        lambda: f"lengths must lie in [0, {max_length}], the tokens there are, got {low if low < 0 else high}.",
    )
    least = exposed.min().item()
    require(least >= 0, lambda: f"exposed must not be negative, got {least}; pass 0 for a teacher without a prefix.")


def check_scalars(
    *,
    temperature: float,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    chunk_bytes: int | None = None,
    reduction: str = "none",
) -> None:
    for name, value in (
        ("temperature", temperature),
        ("teacher_temperature", teacher_temperature),
        ("softcap", softcap),
        ("chunk_bytes", chunk_bytes),
        ("token_clip", token_clip),
    ):
        require(value is None or 0 < value < math.inf, lambda: f"{name} must be positive and finite, got {value}.")
    require(
        entry_clip is None or 0 <= entry_clip < math.inf,
        lambda: f"entry_clip must be finite and not negative, got {entry_clip}; pass None for no clip.",
    )
    require(
        reduction in REDUCTIONS, lambda: f"unknown reduction {reduction!r}; known: {', '.join(map(repr, REDUCTIONS))}."
    )


def check_dtypes(compute_dtype: torch.dtype, logits_dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Checks that operands share a dtype (autocast casts them to one), and that logits are not narrower."""
    require(logits_dtype in FLOATS, lambda: f"logits_dtype must be one of {FLOATS}, got {logits_dtype}.", TypeError)
    if compute_dtype != torch.float64:  # float64 inputs always have float64 logits
        require(
            logits_dtype.itemsize >= compute_dtype.itemsize,
            lambda: (
                f"logits_dtype={logits_dtype} is narrower than the inputs ({compute_dtype}); cast the inputs instead."
            ),
            TypeError,
        )
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.dtype == compute_dtype,
            lambda: (
                f"{name} is {tensor.dtype}, but the other inputs are {compute_dtype}; cast it, "
                "or run under torch.autocast."
            ),
            TypeError,
        )


def check_group(group: Any, backend: str) -> None:
    if group is None:
        return
    # for a rank outside the group, new_group() returns a number
    require(
        isinstance(group, torch.distributed.ProcessGroup),
        lambda: f"group must be a torch.distributed.ProcessGroup this rank belongs to, got {group!r}.",
        TypeError,
    )
    require(
        backend in BACKENDS,
        lambda: (
            f"a head sharded over ranks (group=) needs backend {', '.join(map(repr, BACKENDS))} or 'auto', this call "
            f"asks for {backend!r}."
        ),
    )


def check_targets(targets: Tensor, counted: Tensor | None, vocab: int) -> None:
    """Checks that unmasked targets lie in [0, V). Skipped on a GPU, where reading them would synchronise."""
    if targets.device.type != "cpu" or not targets.numel():
        return
    outside = (targets < 0) | (targets >= vocab)
    if counted is not None:
        outside &= counted.bool()
    if outside.any():
        raise ValueError(
            f"targets must lie in [0, {vocab}), got {targets[outside][0].item()} at {outside.sum().item()} counted "
            "token(s); mask out ignored positions (such as -100) with mask=."
        )


TAILS = ("bucket", "renormalise", "ignore")
MOST_MASS = 1 + 1e-4  # of a distribution, as rounded by a server


def check_topk_tensors(lead: torch.Size, device: torch.device, ids: Tensor, logprobs: Tensor, tail: str) -> None:
    """Checks what needs no value: shapes `[..., K]`, dtypes and devices of the teacher's entries, and `tail`."""
    require(tail in TAILS, lambda: f"unknown tail {tail!r}; known: {', '.join(map(repr, TAILS))}.")
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        require(
            isinstance(tensor, Tensor),
            lambda: f"{name} must be a tensor, got {type(tensor).__name__}; pass torch.as_tensor({name}).",
            TypeError,
        )
        require(
            tensor.dim() >= 2 and tensor.shape[:-1] == lead and tensor.shape[-1] > 0,
            lambda: (
                f"{name} must be [..., K] with the leading shape {tuple(lead)} and K > 0, got {tuple(tensor.shape)}."
            ),
        )
        require(tensor.device == device, lambda: f"{name} is on {tensor.device}, the hidden states on {device}.")
    require(
        ids.shape == logprobs.shape,
        lambda: (
            f"teacher_ids is {tuple(ids.shape)}, teacher_logprobs {tuple(logprobs.shape)}; pass one log-prob an id."
        ),
    )
    require(
        not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool),
        lambda: f"teacher_ids must be integers, got {ids.dtype}.",
        TypeError,
    )
    require(
        logprobs.dtype in FLOATS,
        lambda: f"teacher_logprobs has dtype {logprobs.dtype}; use one of {FLOATS}.",
        TypeError,
    )


def check_topk(ids: Tensor, logprobs: Tensor, counted: Tensor | None, vocab: int, normalised: bool) -> None:
    """Checks the teacher's entries `[N, K]` of unmasked rows. Skipped on a GPU, where reading them would synchronise.

    `normalised`: the log-probs are those of a distribution over the vocabulary, so their mass is at most 1.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    counted = torch.ones(len(ids), dtype=torch.bool) if counted is None else counted.bool()
    outside = ((ids < -1) | (ids >= vocab)) & counted[:, None]
    if outside.any():
        raise ValueError(
            f"teacher_ids must lie in [0, {vocab}), or be -1 for padding, got {ids[outside][0].item()} at "
            f"{outside.sum().item()} place(s) of counted tokens; cut the teacher's entries to the student's vocabulary."
        )
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0) & counted[:, None]
    if twice.any():
        raise ValueError(
            f"teacher_ids must not repeat within a token, got {ordered[:, 1:][twice][0].item()} twice, and "
            f"{twice.any(1).sum().item()} counted token(s) with repeats; merge the entries, or pad one with -1."
        )
    listed = (ids >= 0) & counted[:, None]
    wrong = listed & (logprobs.isnan() | (logprobs == torch.inf))
    if wrong.any():
        raise ValueError(
            f"teacher_logprobs must be log-probabilities, got {logprobs[wrong][0].item()} at {wrong.sum().item()} "
            "listed place(s); pad places without one with id -1."
        )
    mass = torch.where(listed, logprobs.double(), -torch.inf).exp().sum(1)
    if normalised and (mass > MOST_MASS).any():
        raise ValueError(
            f"teacher_logprobs must be normalised over the vocabulary, got a mass of {mass.max().item():.6g} over the "
            "K ids of a token; pass log-probabilities, not logits, or tail='renormalise', which divides by the mass."
        )
