"""Self-distillation on pairs: one response, read by the student behind its prompt and by the teacher behind another.

What a training loop needs around `linear_divergence`, whatever runs the loop; `hf_trainer` and `lightning` are glue
around it. Nothing but torch is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import linear_divergence
from .head import HeadSpec, hidden_states_and_head
from .wrappers import without_wrappers

IGNORED = -100


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Rows of token ids `prompt_ids`, `teacher_prompt_ids`, `response_ids` to a batch padded on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels` (-100 outside the response), each `[B, L]`, and the same three with
        `teacher_` in front, `[B, L_t]`.

    Example:
        >>> from atesd_kernels.integrations.pairs import collate
        >>> row = {"prompt_ids": [1, 2], "teacher_prompt_ids": [1, 2, 3], "response_ids": [7, 8]}
        >>> collate([row])["teacher_labels"]
        tensor([[-100, -100, -100,    7,    8]])
    """
    batch = {}
    for prefix, key in (("", "prompt_ids"), ("teacher_", "teacher_prompt_ids")):
        if any(not row[key] for row in rows):
            raise ValueError(f"an empty {key}: there is no position to predict the first response token from.")
        ids = [torch.tensor([*row[key], *row["response_ids"]]) for row in rows]
        labels = [torch.tensor([IGNORED] * len(row[key]) + [*row["response_ids"]]) for row in rows]
        masks = [torch.ones_like(x) for x in ids]
        for name, columns, padding in (
            ("input_ids", ids, pad_token_id),
            ("attention_mask", masks, 0),
            ("labels", labels, IGNORED),
        ):
            batch[prefix + name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
    return batch


def pair_divergence(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    teacher: nn.Module | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: int | float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The mean over response tokens of the divergence between teacher and student, for a batch of `collate`.

    Args:
        model: the student, under peft, DDP or torch.compile as the trainer has it.
        batch: see `collate`.
        teacher: another model; None is the student without its adapters (peft), which shares its head.
        temperature: of both distributions.
        num_tokens: the mean's denominator where an optimizer step is more than this batch.
        options: further ones of `linear_divergence`, such as `divergence` and `entry_clip`.

    Raises:
        ValueError: no teacher and no adapters to switch off; what `hidden_states_and_head` refuses.
    """
    student, head = _response_states(model, batch, "")
    inner: Any = without_wrappers(model)
    if teacher is None and not hasattr(inner, "disable_adapter"):
        raise ValueError("teacher=None means the model without its adapters, but it has none: pass a frozen copy.")
    other = inner if teacher is None else teacher
    training = other.training
    other.eval()  # a teacher has no dropout
    with torch.no_grad(), inner.disable_adapter() if teacher is None else contextlib.nullcontext():
        states, teacher_head = _response_states(other, batch, "teacher_")
    other.train(training)
    return linear_divergence(
        student,
        head.weight,
        states,
        teacher_head.weight,
        num_tokens=num_tokens,
        **head.divergence_options(temperature, teacher_head),
        **options,
    )


def _response_states(model: nn.Module, batch: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, HeadSpec]:
    """`[N, H]`: the hidden states that predict the response tokens."""
    backbone, head = hidden_states_and_head(model)
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, :-1][batch[f"{prefix}labels"][:, 1:] != IGNORED], head
