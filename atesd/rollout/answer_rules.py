"""What an engine's answers must be: a table of rules for each kind of answer.

Nothing is built from an answer that breaks a rule. A server may be another program than vLLM, or a broken or hostile
one, so the rules take values of any type.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-4  # how far rounding can lift the log-probability of a certain token above 0
LOWEST = -10_000.0  # vLLM's server writes -9,999 for minus infinity
LONGEST_NAME = 1_000  # characters of a model's name


@dataclass(frozen=True)
class Completion:
    """An engine's answer, not checked yet: the types are those it should have."""

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


@dataclass(frozen=True)
class Asked:
    """What a completion must answer.

    Attributes:
        max_tokens: most tokens of the response.
        vocab_size: token ids lie below it.
        stop_ids: tokens that end a response.
        logprobs: whether log-probabilities were asked for; without, they are not looked at.
        nonfinite: whether log-probabilities may be NaN or infinite, as those of an engine in this process.
    """

    max_tokens: int
    vocab_size: int
    stop_ids: frozenset[int]
    logprobs: bool
    nonfinite: bool = False


Rule = tuple[str, Callable[[Any, Any], Iterable[Any]]]
"""What is wrong, and a function of the answer and what was asked for that yields the values that are. `{}` shows the
first of them. A rule may rely on those above it."""


def broken_rule(rules: Iterable[Rule], answer: Any, asked: Any = None) -> str | None:
    """Returns the message of the first rule that `answer` breaks; None if it breaks none."""
    for message, offending in rules:
        for value in offending(answer, asked):
            return message.format(shown(value))
    return None


def shown(value: Any) -> str:
    """A short `repr`, whatever the size of the value."""
    return reprlib.repr(value)


def at(answer: Any, *path: str | int) -> Any:
    """Returns the value at a path through JSON objects and lists; None if there is none."""
    for step in path:
        kind = dict if isinstance(step, str) else list
        if not isinstance(answer, kind) or (step not in answer if kind is dict else step >= len(answer)):
            return None
        answer = answer[step]
    return answer


def unless(holds: bool, value: Any) -> list[Any]:
    return [] if holds else [value]


def is_whole(value: Any) -> bool:
    return type(value) is int  # a bool is an int to isinstance


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_finite(value: int | float) -> bool:
    return value == value and value not in (math.inf, -math.inf)  # math.isfinite fails on integers above 1e308


COMPLETION_RULES: tuple[Rule, ...] = (
    (
        "a response that ended with finish reason {}",
        lambda c, asked: unless(c.finish_reason in ("stop", "length"), c.finish_reason),
    ),
    ("a response whose token ids are no list: {}", lambda c, asked: unless(isinstance(c.token_ids, list), c.token_ids)),
    ("an empty response: {}", lambda c, asked: unless(len(c.token_ids) > 0, c.token_ids)),
    (
        "a response longer than max_completion_length: {} tokens",
        lambda c, asked: unless(len(c.token_ids) <= asked.max_tokens, len(c.token_ids)),
    ),
    (
        "a response with a token id that is no whole number: {}",
        lambda c, asked: (t for t in c.token_ids if not is_whole(t)),
    ),
    (
        "a response with a token id outside the vocabulary: {}",
        lambda c, asked: (t for t in c.token_ids if not 0 <= t < asked.vocab_size),
    ),
    (
        "a response that goes on after the end token {}",
        lambda c, asked: (t for t in c.token_ids[:-1] if t in asked.stop_ids),
    ),
    (
        "a response that stopped at token {}, which is no end token",
        lambda c, asked: unless(c.finish_reason != "stop" or c.token_ids[-1] in asked.stop_ids, c.token_ids[-1]),
    ),
    (
        "a response cut off by its length after {} tokens, before max_completion_length",
        lambda c, asked: unless(c.finish_reason != "length" or len(c.token_ids) == asked.max_tokens, len(c.token_ids)),
    ),
    (
        "a response without a log-probability for each of its tokens: {}",
        lambda c, asked: unless(
            not asked.logprobs or (isinstance(c.logprobs, list) and len(c.logprobs) == len(c.token_ids)), c.logprobs
        ),
    ),
    (
        "a response with a log-probability that is no number: {}",
        lambda c, asked: (p for p in asked_logprobs(c, asked) if not is_number(p)),
    ),
    (
        "a response with a log-probability that is not finite: {}",
        lambda c, asked: (p for p in asked_logprobs(c, asked) if not asked.nonfinite and not is_finite(p)),
    ),
    (
        "a response with a log-probability above 0, or too low to be one: {}",
        lambda c, asked: (p for p in asked_logprobs(c, asked) if is_finite(p) and not LOWEST <= p <= ROUNDING),
    ),
)


def asked_logprobs(completion: Completion, asked: Asked) -> list[Any]:
    return completion.logprobs if asked.logprobs and completion.logprobs is not None else []


# The first model in the answer to GET /v1/models
MODEL_RULES: tuple[Rule, ...] = (
    ("a list of models without a first one: {}", lambda m, asked: unless(isinstance(m, dict), m)),
    (
        "a model whose id is no name: {}",
        lambda m, asked: unless(isinstance(m.get("id"), str) and 0 < len(m["id"]) <= LONGEST_NAME, m.get("id")),
    ),
    (
        "a model whose max_model_len is no positive whole number: {}",
        lambda m, asked: (n for n in [m.get("max_model_len")] if n is not None and not (is_whole(n) and n > 0)),
    ),
)

# The answers to what changes the server's weights, by path. `asked` is the body of the request.
WEIGHT_RULES: dict[str, tuple[Rule, ...]] = {
    "/v1/load_lora_adapter": (
        (
            "it does not say that it has loaded the adapter but {}",
            lambda text, asked: unless(
                isinstance(text, str) and text.startswith("Success") and asked["lora_name"] in text, text
            ),
        ),
    ),
    "/collective_rpc": (
        (
            "it does not say that its workers have loaded the weights but {}",
            lambda answer, asked: unless(bool(rpc := at(answer, "results")) and isinstance(rpc, list), answer),
        ),
    ),
    "/reset_prefix_cache": (
        (
            "it still answers other requests, with keys and values of the old weights: {}",
            lambda answer, asked: unless(at(answer, "success") is not False, answer),
        ),
        (
            "it does not say that it has dropped keys and values of the old weights but {}",
            lambda answer, asked: unless(answer in ("", None) or isinstance(answer, dict), answer),
        ),
    ),
}
