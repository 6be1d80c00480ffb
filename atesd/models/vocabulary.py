"""Which entries of two heads mean the same token, and how the loss leaves out the others.

A head may have more rows than its tokenizer has tokens: families pad them, and models of one family differently. Such
entries get a bias of -inf in both heads, or are cut off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.models.loading import ModelLoadError
from atesd_kernels.integrations.head import HeadSpec


def num_entries(tokenizer: Any) -> int:
    """Returns the number of entries that a head needs for every token of `tokenizer`: its largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def entries_to_sample(config: ATESDConfig, tokenizer: Any) -> int | None:
    """Returns the id below which a rollout's tokens must lie; None for no bound.

    Another model may have no embedding for a padded entry of the student's head.
    """
    return num_entries(tokenizer) if getattr(config, "other_model_teaches", False) else None


def check_same_vocabulary(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Raises ModelLoadError unless both tokenizers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differ = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token)), token),
    )
    if differ:
        first = differ[0]
        seen = [f"token {ids[first]}" if first in ids else "no token" for ids in (theirs, ours)]
        raise ModelLoadError(
            f"teacher_model_name_or_path is {teacher_name!r}, whose tokenizer differs from that of {student_name!r} in "
            f"{len(differ)} of {len(ours)} tokens: {first!r} is {seen[0]} of the teacher and {seen[1]} of the student. "
            "Student and teacher are compared entry by entry: use a teacher of the student's family"
        )


def with_entries(head: HeadSpec, rows: int, known: int) -> HeadSpec:
    """Returns the first `rows` rows of `head`, where entries from `known` on are excluded by a bias of -inf."""
    weight, bias = head.weight, head.bias
    if rows < weight.shape[0]:  # not of all rows: the gradient of a view is copied
        weight, bias = weight[:rows], None if bias is None else bias[:rows]
    if known < rows:
        bias = weight.new_zeros(rows) if bias is None else bias.clone()
        bias[known:] = -torch.inf
    return replace(head, weight=weight, bias=bias)


def cut_to_known(head: HeadSpec, known: int) -> HeadSpec:
    """Returns `head`, where entries from `known` on are excluded."""
    rows = head.weight.shape[0]
    return with_entries(head, rows, min(known, rows))


def over_same_entries(student: HeadSpec, teacher: HeadSpec) -> tuple[HeadSpec, HeadSpec]:
    """Returns both heads with the rows that both have. What one of them excludes is excluded in the other as well."""
    if student.weight.shape[0] == teacher.weight.shape[0] and student.bias is None and teacher.bias is None:
        return student, teacher
    rows = min(student.weight.shape[0], teacher.weight.shape[0])
    student, teacher = with_entries(student, rows, rows), with_entries(teacher, rows, rows)
    excluded = [head.bias.isneginf() for head in (student, teacher) if head.bias is not None]
    if excluded:
        everywhere = torch.stack(excluded).any(0)
        student, teacher = (replace(head, bias=bias_without(head, everywhere)) for head in (student, teacher))
    return student, teacher


def bias_without(head: HeadSpec, excluded: Tensor) -> Tensor:
    bias = head.weight.new_zeros(len(excluded)) if head.bias is None else head.bias
    return bias.masked_fill(excluded, -torch.inf)
