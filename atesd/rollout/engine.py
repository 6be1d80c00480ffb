"""What a rollout engine is: it samples responses to prompts.

Prompts and responses are token ids, so no text is tokenised a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from atesd.errors import AtesdError

ENGINE_WEIGHTS = "engine_weights"  # folder of a run, for an engine that reads the student's weights from files


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        prompt_ids: the student's prompt.
        response_ids: what was sampled, its end-of-sequence token included where one came.
        truncated: True when `max_completion_length` ended it.
        finite: False when the student's logits were not: the response ends there, and the trainer skips the step.
        response_mask: 1 for each response token that the student wrote, 0 for one of a tool or another speaker; None
            for all 1. Tokens with 0 are read, and count in no loss and no statistic.
        logprobs: what the engine says the log-probability of each response token was, at temperature 1 and before
            top-k and top-p; None from an engine that is the trained model itself.
        staleness: optimizer steps between the weights that sampled it and the student that it trains.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    finite: bool = True
    logprobs: list[float] | None = None
    staleness: int = 0
    response_mask: list[int] | None = None

    def counted(self, values: Sequence[Any]) -> list[Any]:
        """Returns those of `values`, one for each response token, whose token counts."""
        if self.response_mask is None:
            return list(values)
        return [value for value, one in zip(values, self.response_mask, strict=True) if one]

    @property
    def num_tokens(self) -> int:
        """Response tokens that count."""
        return len(self.response_ids) if self.response_mask is None else sum(self.response_mask)

    @property
    def cut_off(self) -> bool:
        """Whether it ended before its end token. A grader then takes its closed box only."""
        return self.truncated or not self.finite


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one call that replace the engine's own, for evaluation during training.

    Attributes:
        max_completion_length: most new tokens of a response.
        temperature, top_p, top_k: `top_k=0` and `top_p=1.0` switch the filters off.
        seeds: one for each prompt, each below 2^53; the same seed draws the same response to the same prompt. The
            engine's own random state is neither used nor moved.
    """

    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    seeds: tuple[int, ...]


class RolloutError(AtesdError, RuntimeError):
    """An engine gave no usable responses, or cannot be used: the message says why and what to do."""


class RolloutEngine(Protocol):
    """Samples one response for each prompt, from the student as it was at the last `sync`. `BaseEngine` has the rest.

    A step calls `sync`, `generate` and `release`. `sync` and `release` may be collectives: every process calls them.
    `generate` must not be one: each process calls it for its own prompts. With `max_staleness: 1`, `generate` runs in a
    second thread while the student is updated, so the engine needs a copy of the weights.
    """

    def sync(self) -> None:
        """Take over the student's weights as they are now. Comes before the first `generate`."""

    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]:
        """One response for each prompt, in their order, or RolloutError: never fewer.

        Args:
            prompts: token ids. A prompt stands there once for each response it is to have.
            sampling: how to sample, for an evaluation; None: as the run's settings say.
        """

    def release(self) -> None:
        """Give up memory until the next `sync`, where the engine holds any on the trainer's device."""

    def close(self) -> None:
        """The engine is not needed any more."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, such as the count of responses that seeds are drawn from."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class BaseEngine:
    """Base class for your own engines: no-op defaults for all methods but `generate`.

    Example:
        >>> class Parrot(BaseEngine):
        ...     def generate(self, prompts, sampling=None):
        ...         return [Rollout(prompt, prompt[-1:], truncated=False) for prompt in prompts]
        >>> Parrot().generate([[5, 7]])[0].response_ids
        [7]
    """

    def sync(self) -> None:
        """Nothing to take over: override it where the engine holds a copy of the student's weights."""

    def release(self) -> None:
        """Nothing to give up."""

    def close(self) -> None:
        """Nothing to end."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


def require_vllm() -> None:
    if find_spec("vllm") is None:
        raise RolloutError(
            "rollout_engine is 'vllm', which is not installed here: pip install 'atesd[vllm]' (without a GPU: see "
            "requirements-vllm.txt), or set rollout_engine to 'hf'."
        )
