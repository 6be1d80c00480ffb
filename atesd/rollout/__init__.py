"""Engines that write the student's responses, behind one protocol.

An engine is given prompts as token ids and answers with token ids: text is never tokenised a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from atesd.config import ATESDConfig


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        prompt_ids: the student's prompt.
        response_ids: what was sampled, its end-of-sequence token included where one came.
        truncated: True when `max_completion_length` ended it.
        finite: False when the student's logits were not: the response ends there, and the trainer skips the step.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    finite: bool = True


@dataclass(frozen=True)
class Sampling:
    """How one call samples, where it is not to be the engine's own way: evaluation beside training.

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


class RolloutEngine(Protocol):
    """Samples one response for each prompt from the student as it is now."""

    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_engine(config: ATESDConfig, model: Any, tokenizer: Any, rank: int = 0) -> RolloutEngine:
    """The engine `config.rollout_engine` names; each process (`rank`) draws other responses."""
    if config.rollout_engine == "hf":
        from atesd.rollout.hf import HFEngine

        return HFEngine(
            model,
            tokenizer,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed + 7919 * rank,
            bf16=config.bf16,
        )
    raise ValueError(f"rollout_engine is {config.rollout_engine!r}; this version generates with 'hf' only.")
