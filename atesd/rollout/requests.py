"""Base class of engines that answer requests: builds requests, checks the answers, and retries.

vLLM in this process and vLLM behind a server differ only in how they send a request. Every response has its own seed,
so sampling does not depend on the order of answers or on the other requests in a batch.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from atesd.rollout.answer_rules import COMPLETION_RULES, Asked, Completion, broken_rule
from atesd.rollout.engine import Rollout, RolloutError, Sampling
from atesd.rollout.seeds import ResponseSeeds
from atesd.terminal import show

STOPPED = "the engine was stopped while it was generating."


class RequestEngine(ABC):
    """Converts prompts to requests with seeds, retries those that fail, and raises an error if they keep failing.

    Args:
        stop_ids: tokens that end a response. They replace the engine's own list: all engines stop at the same tokens.
        context_length: maximum length of prompt plus response.
        vocab_size: number of token ids that the model knows.
        max_completion_length, temperature, top_p, top_k, seeds: sampling of training rollouts.
        retries: number of times to retry a failed response.
        timeout: seconds after which a request fails.
    """

    pause = 0.0  # seconds before the first retry; the second waits twice as long
    nonfinite = True  # log-probabilities that are not finite are the student's: the trainer skips the step

    def __init__(
        self,
        *,
        stop_ids: list[int],
        context_length: int,
        vocab_size: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: ResponseSeeds | None = None,
        retries: int = 2,
        timeout: float = 1800.0,
    ):
        self.stop_ids, self.context_length, self.vocab_size = stop_ids, context_length, vocab_size
        self.max_completion_length = max_completion_length
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.seeds = ResponseSeeds(0) if seeds is None else seeds
        self.retries, self.timeout = retries, timeout
        self.stopped = threading.Event()  # set by a thread other than the generating one

    @abstractmethod
    def complete(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[Completion | Exception]:
        """Returns an answer or an exception for each prompt. `parameters` are vLLM's sampling parameters."""

    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]:
        """Returns one response per prompt. They have log-probabilities only if `sampling` is None."""
        if sampling is not None:
            return self.ask_for(prompts, sampling, logprobs=False)
        seeds = self.seeds.following(len(prompts))
        sampling = Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k, seeds)
        rollouts = self.ask_for(prompts, sampling, logprobs=True)
        self.seeds.count(len(prompts))
        return rollouts

    def ask_for(self, prompts: list[list[int]], sampling: Sampling, logprobs: bool) -> list[Rollout]:
        longest = max(map(len, prompts))
        if longest + sampling.max_completion_length > self.context_length:
            raise RolloutError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_completion_length} do not fit the "
                f"rollout engine's context of {self.context_length} tokens. Lower max_prompt_length or "
                "max_completion_length, or start the engine with a longer context."
            )
        parameters = [request_parameters(sampling, seed, self.stop_ids, logprobs) for seed in sampling.seeds]
        stop_ids = frozenset(self.stop_ids)
        asked = Asked(sampling.max_completion_length, self.vocab_size, stop_ids, logprobs, self.nonfinite)

        def ask(left: list[int]) -> list[Completion | Exception]:
            return self.complete([prompts[i] for i in left], [parameters[i] for i in left])

        waits = (self.pause * attempt for attempt in range(1 + self.retries))
        answers = usable_answers(len(prompts), ask, lambda _, answer: what_is_wrong(answer, asked), waits, self.stopped)
        return [rollout(prompt, answer, asked) for prompt, answer in zip(prompts, answers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return self.seeds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seeds.load_state_dict(state)


def usable_answers(
    count: int,
    ask: Callable[[list[int]], Sequence[Any]],
    wrong: Callable[[int, Any], str | None],
    waits: Iterable[float],
    stopped: threading.Event,
    what: str = "rollouts",
) -> list[Any]:
    """Returns an answer to each of `count` requests. Those that are not usable are asked for again.

    Args:
        ask: returns the answers to the requests of these numbers.
        wrong: returns why the answer to a request is not usable, None if it is; raises if asking again is no use.
        waits: seconds to wait before each try.
        stopped: set where no answer is wanted any more.
        what: what is asked for, in messages.

    Raises:
        RolloutError: the tries are used up, or `stopped` is set.
    """
    done: dict[int, Any] = {}
    problem, first, tries = "", "", 0
    for wait in waits:
        left = [i for i in range(count) if i not in done]
        if tries:
            show(f"{len(left)} of {count} {what} failed and are asked for again: {problem}")
        if stopped.wait(wait):
            raise RolloutError(STOPPED)
        tries += 1
        first = first or problem
        for i, answer in zip(left, ask(left), strict=True):
            if (found := wrong(i, answer)) is None:
                done[i] = answer
            else:
                problem = found
        if len(done) == count:
            return [done[i] for i in range(count)]
    before = f"The first: {first}. " if first and first != problem else ""  # a server that died only refuses later
    raise RolloutError(f"{count - len(done)} of {count} {what} failed {tries} times. {before}The last: {problem}")


def what_is_wrong(answer: Completion | Exception, asked: Asked) -> str | None:
    """Returns why an answer is not usable; None if it is usable. Raises it if asking again is no use."""
    if isinstance(answer, RolloutError):
        raise answer
    if isinstance(answer, Exception):
        return f"{type(answer).__name__}: {answer}"
    return broken_rule(COMPLETION_RULES, answer, asked)


def rollout(prompt: list[int], answer: Completion, asked: Asked) -> Rollout:
    """Builds a rollout from an answer that breaks no rule."""
    logprobs = [float(p) for p in answer.logprobs or ()] if asked.logprobs else None
    finite = all(map(math.isfinite, logprobs or ()))
    truncated = finite and answer.finish_reason == "length"
    return Rollout(prompt, answer.token_ids, truncated, finite, logprobs)


def request_parameters(sampling: Sampling, seed: int, stop_ids: list[int], logprobs: bool) -> dict[str, Any]:
    """Returns sampling parameters under vLLM's names. Sets all that a model's generation config could override."""
    return {
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,
        "logprobs": 0 if logprobs else None,
    }
