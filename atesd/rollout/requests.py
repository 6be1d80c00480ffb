"""Base class of engines that answer requests: builds requests, checks the answers, and retries.

vLLM in this process and vLLM behind a server differ only in how they send a request. Every response has its own seed,
so sampling does not depend on the order of answers or on the other requests in a batch.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from atesd.rollout.engine import Rollout, RolloutError, Sampling
from atesd.rollout.seeds import ResponseSeeds

STOPPED = "the engine was stopped while it was generating."


@dataclass(frozen=True)
class Completion:
    """An engine's answer, not checked yet."""

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


class RequestEngine(ABC):
    """Converts prompts to requests with seeds, retries those that fail, and raises an error if they keep failing.

    Args:
        stop_ids: tokens that end a response. They replace the engine's own list: all engines stop at the same tokens.
        context_length: maximum length of prompt plus response.
        max_completion_length, temperature, top_p, top_k, seeds: sampling of training rollouts.
        retries: number of times to retry a failed response.
        timeout: seconds after which a request fails.
    """

    pause = 0.0  # seconds before the first retry; the second waits twice as long

    def __init__(
        self,
        *,
        stop_ids: list[int],
        context_length: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: ResponseSeeds | None = None,
        retries: int = 2,
        timeout: float = 1800.0,
    ):
        self.stop_ids, self.context_length = stop_ids, context_length
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
        done: dict[int, Rollout] = {}
        problem = ""
        for attempt in range(1 + self.retries):
            left = [i for i in range(len(prompts)) if i not in done]
            if attempt:
                tqdm.write(f"{len(left)} of {len(prompts)} rollouts failed and are asked for again: {problem}")
            if self.stopped.wait(self.pause * attempt):
                raise RolloutError(STOPPED)
            answers = self.complete([prompts[i] for i in left], [parameters[i] for i in left])
            for i, answer in zip(left, answers, strict=True):
                wrong = self.what_is_wrong(answer, logprobs)
                if wrong is None:
                    finite = all(map(math.isfinite, answer.logprobs or ()))
                    truncated = finite and answer.finish_reason == "length"
                    done[i] = Rollout(prompts[i], answer.token_ids, truncated, finite, answer.logprobs)
                else:
                    problem = wrong
            if len(done) == len(prompts):
                return [done[i] for i in range(len(prompts))]
        failed = len(prompts) - len(done)
        raise RolloutError(f"{failed} of {len(prompts)} rollouts failed {1 + self.retries} times. The last: {problem}")

    def what_is_wrong(self, answer: Completion | Exception, logprobs: bool) -> str | None:
        """Returns why an answer is not usable for training; None if it is usable."""
        if isinstance(answer, RolloutError):
            raise answer
        if isinstance(answer, Exception):
            return f"{type(answer).__name__}: {answer}"
        if not answer.token_ids:
            return f"an empty response (finish reason {answer.finish_reason!r})"
        if answer.finish_reason not in ("stop", "length"):
            return f"a response that ended with finish reason {answer.finish_reason!r}"
        if answer.finish_reason == "stop" and answer.token_ids[-1] not in self.stop_ids:
            return f"a response that stopped at token {answer.token_ids[-1]}, which is no end token"
        if logprobs and (answer.logprobs is None or len(answer.logprobs) != len(answer.token_ids)):
            return "a response without a log-probability for each of its tokens"
        return None

    def state_dict(self) -> dict[str, Any]:
        return self.seeds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seeds.load_state_dict(state)


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
