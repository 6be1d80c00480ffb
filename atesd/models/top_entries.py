"""What a teacher behind a server says of response tokens: its most likely tokens, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atesd.models.batching import to_device

LEAST_REST = 1e-6  # of the mass outside the listed tokens, as in `linear_topk_divergence`


@dataclass(frozen=True)
class TopEntries:
    """The teacher at `N` response tokens.

    Attributes:
        ids: `(N, K)` int64, without order; -1 pads a token that has fewer.
        logprobs: `(N, K)` float64, in nats, at temperature 1, over the entries that the tokenizer knows.
        of_targets: `(N,)` float64, those of the response tokens themselves.
        known: ids lie below it: the entries that student and teacher share.
    """

    ids: Tensor
    logprobs: Tensor
    of_targets: Tensor
    known: int

    def at(self, temperature: float) -> Tensor:
        """Returns the log-probabilities divided by `temperature`: right up to a constant for each token."""
        return self.logprobs if temperature == 1 else self.logprobs / temperature

    def entropy(self) -> Tensor:
        """Returns `(N,)`: the entropy over the listed tokens and the rest, which counts as one."""
        p = torch.where(self.ids >= 0, self.logprobs.exp(), 0.0)
        rest = (1 - p.sum(1)).clamp_min(LEAST_REST)
        return torch.special.entr(p).sum(1) + torch.special.entr(rest)

    def to(self, device: torch.device) -> TopEntries:
        moved = {name: to_device(getattr(self, name), device) for name in ("ids", "logprobs", "of_targets")}
        return replace(self, **moved)


def without_padding_rows(ids: Tensor, logprobs: Tensor, of_targets: Tensor, known: int) -> TopEntries:
    """Returns the entries below `known`, with their log-probabilities given that it is one of them.

    The other ids are rows with which a family pads its head. They are excluded, as those of a local teacher.
    """
    beyond = ids >= known
    mass = torch.where(beyond, logprobs.exp(), 0.0).sum(1)
    shift = torch.log1p(-mass)
    return TopEntries(ids.masked_fill(beyond, -1), logprobs - shift[:, None], of_targets - shift, known)


def no_entries(known: int) -> TopEntries:
    """Returns the entries of a response without a token that counts."""
    rows = torch.zeros(0, 1, dtype=torch.float64)
    return TopEntries(rows.long(), rows, rows[:, 0], known)


def concatenated(parts: Sequence[TopEntries], known: int) -> TopEntries:
    """Returns the tokens of `parts` in their order, padded to the same number of entries."""
    width = max((part.ids.shape[1] for part in parts), default=1)

    def padded(rows: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)

    return TopEntries(
        torch.cat([padded(part.ids, -1) for part in parts]),
        torch.cat([padded(part.logprobs, 0.0) for part in parts]),
        torch.cat([part.of_targets for part in parts]),
        known,
    )
