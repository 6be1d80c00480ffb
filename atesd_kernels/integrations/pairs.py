"""Self-distillation on pairs: student and teacher read the same response after different prompts.

It provides collation and the loss for any training loop; `hf_trainer` and `lightning` use it. It imports torch only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import linear_divergence
from .backbone import AuxLoss, aux_loss_of
from .head import HeadSpec, hidden_states_and_head
from .wrappers import eval_mode, without_wrappers

IGNORED = -100


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Collates rows of token ids `prompt_ids`, `teacher_prompt_ids`, `response_ids` to a batch padded on the right.

    Args:
        rows: each of the three is a list, an array or a tensor of integers, as `Dataset.with_format` makes them. A row
            may have a `response_mask` too, 0 or 1 for each response token: tokens with 0, such as a tool's, are read
            and count in no loss. It may have a `weight`, the factor of its tokens' loss (default 1).
        pad_token_id: fills `input_ids`.

    Returns:
        A dict of `input_ids`, `attention_mask`, `labels` (-100 outside the response), each `[B, L]` int64, and the same
        three with the prefix `teacher_`, `[B, L_t]`. With weights also `sample_weight`, `[B]` fp32.

    Raises:
        ValueError: if a prompt is empty, ids are not a sequence of integers, a mask does not fit its response, or a
            weight is negative or not finite.

    Example:
        >>> from atesd_kernels.integrations.pairs import collate
        >>> row = {"prompt_ids": [1, 2], "teacher_prompt_ids": [1, 2, 3], "response_ids": [7, 8]}
        >>> collate([row])["teacher_labels"]
        tensor([[-100, -100, -100,    7,    8]])
    """
    batch = {}
    responses = [_token_ids(row, "response_ids") for row in rows]
    targets = [_counted(row, response) for row, response in zip(rows, responses, strict=True)]
    for prefix, key in (("", "prompt_ids"), ("teacher_", "teacher_prompt_ids")):
        prompts = [_token_ids(row, key) for row in rows]
        if any(not len(prompt) for prompt in prompts):
            raise ValueError(f"a row has an empty {key}; predicting the first response token needs one prompt token.")
        pairs = list(zip(prompts, responses, strict=True))
        ids = [torch.cat(pair) for pair in pairs]
        labels = [torch.cat([torch.full_like(p, IGNORED), target]) for p, target in zip(prompts, targets, strict=True)]
        masks = [torch.ones_like(x) for x in ids]
        for name, columns, padding in (
            ("input_ids", ids, pad_token_id),
            ("attention_mask", masks, 0),
            ("labels", labels, IGNORED),
        ):
            batch[prefix + name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
    if any("weight" in row for row in rows):
        batch["sample_weight"] = torch.tensor([_weight(row) for row in rows])
    return batch


def _counted(row: Mapping[str, Any], response: Tensor) -> Tensor:
    """Returns the response with `IGNORED` where its mask is 0, `[L]` int64."""
    if row.get("response_mask") is None:
        return response
    given = row["response_mask"]
    try:
        mask = given if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError):
        mask = torch.empty(0, 0)
    if mask.shape != response.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"a row's response_mask needs a 0 or 1 for each of {len(response)} tokens, got {given!r}.")
    return response.masked_fill(mask == 0, IGNORED)


def _weight(row: Mapping[str, Any]) -> float:
    weight = float(row.get("weight", 1.0))
    if not 0 <= weight < math.inf:
        raise ValueError(f"a row's weight is {weight}; it must be finite and not negative.")
    return weight


def _token_ids(row: Mapping[str, Any], key: str) -> Tensor:
    """Returns a row's token ids, `[L]` int64."""
    ids = row[key]
    try:
        ids = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a row's {key} must be a sequence of token ids, got {row[key]!r}.") from error
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise ValueError(f"a row's {key} must be a sequence of token ids, got {row[key]!r}.")
    return ids.long()


def pair_divergence(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    teacher: nn.Module | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: int | float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Returns the mean divergence between teacher and student over the response tokens of a batch, a scalar.

    Where the student's configuration asks for its experts' auxiliary loss (`output_router_logits`), the result
    includes it, weighted by the model's own coefficient and by the batch's share of `num_tokens`.

    Args:
        model: the student, bare or wrapped by peft, DDP or torch.compile.
        batch: see `collate`. Weights multiply the tokens' losses, and do not change the denominator.
        teacher: another model; None means the student without its peft adapters, which shares its head.
        temperature: of both distributions.
        num_tokens: the mean's denominator, if an optimizer step has more than this batch.
        options: more options for `linear_divergence`, such as `divergence` and `entry_clip`.

    Raises:
        ValueError: if there is neither a teacher nor an adapter, or `hidden_states_and_head` raises.
    """
    return pair_losses(model, batch, teacher, temperature=temperature, num_tokens=num_tokens, **options).total


class PairLosses(NamedTuple):
    """The loss of a batch, and its student's auxiliary loss without its coefficient (None: it has none), scalars."""

    total: Tensor
    aux_loss: Tensor | None


def pair_losses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    teacher: nn.Module | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: int | float | Tensor | None = None,
    **options: Any,
) -> PairLosses:
    """`pair_divergence` for trainers that log the auxiliary loss too. Takes the same arguments."""
    student, head, aux = _response_states(model, batch, "")
    inner: Any = without_wrappers(model)
    if teacher is None and not hasattr(inner, "disable_adapter"):
        raise ValueError(
            "teacher=None means the model without its adapters, but the model has none: pass a frozen copy."
        )
    other = inner if teacher is None else teacher
    adapter_off = inner.disable_adapter() if teacher is None else contextlib.nullcontext()
    with torch.no_grad(), eval_mode(other), adapter_off:  # no dropout for the teacher
        states, teacher_head, _ = _response_states(other, batch, "teacher_")
    if "sample_weight" in batch:
        counted = batch["labels"][:, 1:] != IGNORED
        weight = batch["sample_weight"][:, None].expand_as(counted)[counted]
        own = options.get("token_weight")
        options["token_weight"] = weight if own is None else weight * own
    loss = linear_divergence(
        student,
        head.weight,
        states,
        teacher_head.weight,
        num_tokens=num_tokens,
        **head.divergence_options(temperature, teacher_head),
        **options,
    )
    if aux is None:
        return PairLosses(loss, None)
    share = 1.0 if num_tokens is None else len(student) / num_tokens
    return PairLosses(loss + aux.weighted(share), aux.value.detach())


def _response_states(
    model: nn.Module, batch: Mapping[str, Tensor], prefix: str
) -> tuple[Tensor, HeadSpec, AuxLoss | None]:
    """Returns the hidden states that predict the response tokens, `[N, H]`, the head and the auxiliary loss."""
    backbone, head = hidden_states_and_head(model)
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    rows = output.last_hidden_state[:, :-1][batch[f"{prefix}labels"][:, 1:] != IGNORED]
    return rows, head, aux_loss_of(output)
