"""What a server's scores of a passage must be. See `rollout.answer_rules` for the form of a rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atesd.rollout.answer_rules import LOWEST, ROUNDING, Rule, at, is_number, unless
from atesd.served_teacher.passages import Passage

PADDING = 4096  # most rows by which a served head may exceed the tokenizer (our choice; families pad by hundreds)
MOST_MASS = 1 + 5e-5  # of a token's listed probabilities; the loss refuses 1 + 1e-4
MOST_PADDED = 0.5  # probability of rows that no token has: a model trained on text gives them next to nothing


@dataclass(frozen=True)
class AskedScores:
    """What the scores must answer.

    Attributes:
        passage: that was sent.
        top: number of most likely tokens asked for; the scored token comes beside them if it is not among them.
        known: entries that the student's tokenizer knows.
    """

    passage: Passage
    top: int
    known: int


def entries(choice: Any, asked: AskedScores) -> Iterator[Any]:
    """What the server says of each token that is scored."""
    return (choice["prompt_logprobs"][place] for place in asked.passage.places)


def scored(asked: AskedScores) -> Iterator[int]:
    return (asked.passage.ids[place] for place in asked.passage.places)


def token_ids(choice: Any, asked: AskedScores) -> Iterator[str]:
    return (key for entry in entries(choice, asked) for key in entry)


def is_token_id(key: str) -> bool:
    """Whether `key` is a number as JSON's keys hold it: without a sign or leading zeros, so that none comes twice."""
    return key.isascii() and key.isdecimal() and len(key) < 10 and (key == "0" or key[0] != "0")


def is_logprob(value: Any) -> bool:
    return is_number(value) and LOWEST <= value <= ROUNDING


def mass(entry: dict[str, Any], first: int = 0) -> float:
    """The probability of the listed tokens from the id `first` on."""
    return math.fsum(math.exp(value["logprob"]) for key, value in entry.items() if int(key) >= first)


# Of the first choice of a completion, which is an object.
SCORE_RULES: tuple[Rule, ...] = (
    (
        "prompt_logprobs that are no list: {}",
        lambda c, asked: unless(isinstance(c.get("prompt_logprobs"), list), c.get("prompt_logprobs")),
    ),
    (
        "prompt_logprobs of {} tokens, where another number was sent",
        lambda c, asked: unless(len(c["prompt_logprobs"]) == len(asked.passage.ids), len(c["prompt_logprobs"])),
    ),
    (
        "scores of other tokens than were sent: {}",
        lambda c, asked: unless(
            c.get("prompt_token_ids") in (None, list(asked.passage.ids)), c.get("prompt_token_ids")
        ),
    ),
    (
        "a token whose log-probabilities are no object: {}",
        lambda c, asked: (entry for entry in entries(c, asked) if not isinstance(entry, dict)),
    ),
    (
        "a token with {} log-probabilities, which is not the number asked for, nor one more",
        lambda c, asked: (len(entry) for entry in entries(c, asked) if len(entry) - asked.top not in (0, 1)),
    ),
    (
        "a log-probability of {}, which is no token id",
        lambda c, asked: (key for key in token_ids(c, asked) if not is_token_id(key)),
    ),
    (
        "a log-probability of a token id outside the vocabulary: {}",
        lambda c, asked: (key for key in token_ids(c, asked) if int(key) >= asked.known + PADDING),
    ),
    (
        "a log-probability that is none: {}",
        lambda c, asked: (v for e in entries(c, asked) for v in e.values() if not is_logprob(at(v, "logprob"))),
    ),
    (
        "no log-probability of the scored token {}",
        lambda c, asked: (t for t, entry in zip(scored(asked), entries(c, asked), strict=True) if str(t) not in entry),
    ),
    (
        "a token whose listed probabilities sum to {}",
        lambda c, asked: (total for entry in entries(c, asked) if (total := mass(entry)) > MOST_MASS),
    ),
    (
        "a probability of {} on ids that the student's tokenizer does not know",
        lambda c, asked: (p for entry in entries(c, asked) if (p := mass(entry, asked.known)) > MOST_PADDED),
    ),
)
