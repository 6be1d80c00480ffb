"""The teacher of `linear_divergence`: one model, or several views whose logits are mixed.

Turns the caller's tensors, or lists of them, into what an operator takes. Each view passes the checks of one teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .arguments import same_storage
from .shards import replicated_tensor, shard_of
from .spec import accumulate_dtype

SUM_TOLERANCE = 1e-6  # on the sum of a token's weights, which are then divided by it


class View(NamedTuple):
    """One teacher's tensors."""

    label: str  # for messages: "[0]", "[1]" and so on; "" if there is one teacher
    hidden: Tensor  # [..., H_m]
    weight: Tensor | None  # [V, H_m]; None: the student's
    bias: Tensor | None  # [V]


def views_of(student_weight: Tensor, hidden: Any, weight: Any, bias: Any, mix: Tensor | None) -> list[View]:
    """Returns the caller's views. A head that is the student's own becomes None."""
    several = isinstance(hidden, (list, tuple))
    checks.require(
        several or isinstance(hidden, Tensor),
        lambda: f"teacher_hidden must be a tensor, or a list of them, got {type(hidden).__name__}.",
        TypeError,
    )
    checks.require(
        several or mix is None,
        lambda: "teacher_mix weighs several views, but teacher_hidden is one tensor; pass a list of views.",
    )
    checks.require(
        mix is not None or not several,
        lambda: f"teacher_hidden is a list of {len(hidden)} views; pass their weights as teacher_mix, [M] or [M, ...].",
    )
    views = list(hidden) if several else [hidden]
    checks.require(len(views) > 0, lambda: "teacher_hidden is an empty list; pass a tensor for each view.")
    heads = _one_for_each("teacher_weight", weight, len(views), several)
    biases = _one_for_each("teacher_bias", bias, len(views), several)
    found = []
    for m, (states, head, shift) in enumerate(zip(views, heads, biases, strict=True)):
        label = f"[{m}]" if several else ""
        checks.require(
            isinstance(states, Tensor),
            lambda label=label, states=states: f"teacher_hidden{label} must be a tensor, got {type(states).__name__}.",
            TypeError,
        )
        own = head is not None and not same_storage(student_weight, head)
        found.append(View(label, states, head if own else None, shift))
    return found


def _one_for_each(name: str, value: Any, count: int, several: bool) -> list[Tensor | None]:
    """Returns an entry for each view from None, one tensor, or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    checks.require(
        several, lambda: f"{name} is a list, but teacher_hidden is one tensor; pass one tensor, or a list of views."
    )
    checks.require(
        len(value) == count,
        lambda: f"{name} has {len(value)} entries for {count} views; pass None, one tensor, or an entry for each view.",
    )
    return list(value)


def local_views(views: list[View], group: Any) -> tuple[list[View], Any]:
    """Returns the views as plain tensors, this rank's shards of their heads and biases, and the process group."""
    found = []
    for label, hidden, weight, bias in views:
        hidden = replicated_tensor(f"teacher_hidden{label}", hidden)
        weight, group = shard_of(f"teacher_weight{label}", weight, group)
        bias, group = shard_of(f"teacher_bias{label}", bias, group)
        found.append(View(label, hidden, weight, bias))
    return found, group


def check_views(student_hidden: Tensor, student_weight: Tensor, views: list[View]) -> None:
    """Checks each view's shapes, devices and dtypes against the student's."""
    for label, hidden, weight, bias in views:
        checks.check_pair(student_hidden, hidden, "hidden", label)
        checks.check_head("teacher", hidden, student_weight if weight is None else weight, bias, label)
        if weight is not None:
            checks.check_vocabulary(student_weight.shape[0], weight.shape[0])


def flat_states(view: View, num_rows: int) -> Tensor:
    """Returns a view's hidden states as rows, `[N, H_m]`, without gradient."""
    return view.hidden.detach().reshape(num_rows, view.hidden.shape[-1])


def flat_mix(mix: Any, num_views: int, lead: torch.Size, device: torch.device, mask: Tensor | None) -> Tensor:
    """Returns the weights of the views in each row, `[M, N]` float64, divided by their sum. `mask` is `[N]` bool.

    On a GPU and while torch.compile traces, the values are the caller's promise.

    Raises:
        ValueError, TypeError: if the weights have another shape, dtype or device, need a gradient, are not finite, or
            do not sum to 1 in a row that counts.
    """
    per_token = (num_views, *lead)
    kind = mix.dtype if isinstance(mix, Tensor) else type(mix).__name__
    checks.require(
        kind in checks.FLOATS,
        lambda: f"teacher_mix must be a floating tensor, got {kind}; pass torch.tensor([0.5, 0.5]).",
        TypeError,
    )
    checks.require(
        not mix.requires_grad, lambda: "teacher_mix needs a gradient, but the teacher has none; pass its detach()."
    )
    checks.require(
        tuple(mix.shape) in ((num_views,), per_token),
        lambda: f"teacher_mix must be [M] = {(num_views,)} or [M, ...] = {per_token}, got {tuple(mix.shape)}.",
    )
    checks.require(
        mix.device == device, lambda: f"teacher_mix is on {mix.device}, the hidden states on {device}; move it there."
    )
    rows = mix.double().reshape(num_views, -1).expand(num_views, lead.numel())
    total = rows.sum(0)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_total(total if mask is None else total[mask])
    return rows / total


def _check_total(total: Tensor) -> None:
    """Checks that the weights of each row sum to 1; their `total` is not finite if one of them is not."""
    if not total.numel():
        return
    worst = total[(total - 1).abs().nan_to_num(nan=torch.inf).argmax()].item()
    checks.require(
        abs(worst - 1) <= SUM_TOLERANCE,  # false for NaN
        lambda: (
            f"teacher_mix must be finite and sum to 1 over the views within {SUM_TOLERANCE}, got a sum of {worst}; "
            "divide it by its sum, and keep it in float32 or wider."
        ),
    )


def mixed_biases(
    views: list[View], student_weight: Tensor, student_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the student's bias `[V]`, and the views' biases `[M, V]`, or None where each view has the student's.

    An entry that a view excludes (-inf) is at -inf in all of them and in the student's bias. A view with the student's
    head and no bias of its own has the student's bias.
    """
    biases = [student_bias if bias is None and weight is None else bias for _, _, weight, bias in views]
    if all(bias is student_bias for bias in biases):
        return student_bias, None
    dtype = accumulate_dtype(student_weight.dtype)
    zeros = torch.zeros(student_weight.shape[0], dtype=dtype, device=student_weight.device)
    rows = torch.stack([zeros if bias is None else bias.detach().to(dtype) for bias in biases])
    excluded = torch.isneginf(rows).any(0)
    student = zeros if student_bias is None else student_bias
    return student.masked_fill(excluded, -torch.inf), rows.masked_fill(excluded, -torch.inf)
