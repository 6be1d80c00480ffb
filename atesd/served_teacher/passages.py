"""What a teacher's server is sent: a prompt with its response, and which tokens of it are scored."""

from __future__ import annotations

from dataclasses import dataclass

from atesd.models.batching import PackedBatch


@dataclass(frozen=True)
class Passage:
    """A prompt and a response.

    Attributes:
        ids: their tokens.
        places: where the response tokens that count stand in `ids`.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]


def passages_of(batch: PackedBatch) -> list[Passage]:
    """Returns the sequences of `batch` in their order. Reads it from its device, which the answers take longer than."""
    ids, rows, ends = (tensor.flatten().tolist() for tensor in (batch.input_ids, batch.rows, batch.ends))
    found, start, first = [], 0, 0
    for end, count in zip(ends, batch.lengths, strict=True):
        places = (row + 1 - start for row in rows[first : first + count])  # a row predicts the token after it
        found.append(Passage(tuple(ids[start:end]), tuple(places)))
        start, first = end, first + count
    return found
