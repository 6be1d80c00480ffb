"""The batches of a run: a step's problems and the student's responses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from atesd.data.problems import Problem
from atesd.data.run_data import RunData
from atesd.models.batching import PackedBatch, ProblemSampler, pack
from atesd.parallel.processes import Processes
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.engine import Rollout, RolloutEngine, RolloutError
from atesd.terminal import progress


class RolloutBatches:
    """Selects the problems of each step and generates the responses of this process.

    Args:
        data: problems, references and prompts.
        sampler: chooses the order of problems.
        engine: generates responses; an `AheadEngine` generates the next step's while this one trains.
        processes: the processes of the run.
        num_generations: responses per problem.
        from_references: use reference solutions instead of rollouts (supervised fine-tuning).
        phase: `phase(name)` is a context manager that times that part of a step.

    Attributes:
        problems_per_step: number over all processes.
    """

    def __init__(
        self,
        data: RunData,
        sampler: ProblemSampler,
        engine: RolloutEngine,
        processes: Processes,
        *,
        problems_per_step: int,
        num_generations: int,
        from_references: bool,
        phase: Callable[[str], AbstractContextManager[None]],
    ):
        self.data, self.sampler, self.engine, self.processes, self.phase = data, sampler, engine, processes, phase
        self.problems_per_step, self.num_generations = problems_per_step, num_generations
        self.from_references = from_references

    def next(self, last: bool) -> tuple[list[Problem], list[Rollout]]:
        """Returns the next step's problems of all processes, and the responses to this process's block of them.

        Each problem is repeated for each of its responses. `last`: no batch follows, so none is generated ahead.

        Raises:
            RolloutError: on every process, if one engine failed. The states of sampler and engine are then restored, so
                a resumed run gets the same batch.
        """
        ahead = self.engine if isinstance(self.engine, AheadEngine) else None
        if ahead:
            with self.phase("rollout"):
                ahead.wait()  # for the batch that the last step began
        before = [part.state_dict() for part in (self.sampler, self.engine)]
        batch = self.problems_of(self.sampler.draw)
        try:
            rollouts, failure = self.responses(self.processes.local_block(batch)), None
        except RolloutError as error:
            rollouts, failure = [], error
        if self.processes.any(failure is not None):
            for part, state in zip((self.sampler, self.engine), before, strict=True):
                part.load_state_dict(state)
            raise failure or RolloutError("the rollouts of another process failed")
        if ahead and not last:  # from the student before this step's update
            ahead.begin([self.data.prompts.student(problem) for problem in self.problems_of(self.sampler.peek)])
        return batch, rollouts

    def problems_of(self, draw: Callable[[int], list[int]]) -> list[Problem]:
        """Returns the problems of a step. `draw` is `sampler.draw` or `sampler.peek`."""
        train = self.data.problems.train
        return [train[i] for i in draw(self.problems_per_step) for _ in range(self.num_generations)]

    def responses(self, problems: list[Problem]) -> list[Rollout]:
        """Returns one response y ~ p_S(.|x) per problem, from the current student (with `max_staleness`, the student of
        one update ago). With `from_references`, returns the reference solutions."""
        prompts = [self.data.prompts.student(problem) for problem in problems]
        if self.from_references:
            replies = [self.data.prompts.reference_completion(self.data.references[p.id])[0] for p in problems]
            return [Rollout(prompt, reply, truncated=False) for prompt, reply in zip(prompts, replies, strict=True)]
        with self.phase("weight_sync"):
            self.engine.sync()
        with self.phase("rollout"), progress("rollouts", len(prompts), hidden=not self.processes.is_main):
            rollouts = self.engine.generate(prompts)
            self.engine.release()
        check_masks(rollouts)
        return rollouts


def pack_rollouts(prompts: list[list[int]], rollouts: list[Rollout], device: torch.device) -> PackedBatch:
    """Packs `prompts`, the student's or the teacher's, with the responses."""
    return pack(prompts, [r.response_ids for r in rollouts], device, [r.response_mask for r in rollouts])


def check_masks(rollouts: list[Rollout]) -> None:
    """Raises RolloutError for a mask that no engine should give."""
    for rollout in rollouts:
        mask, length = rollout.response_mask, len(rollout.response_ids)
        if mask is not None and (len(mask) != length or not {0, 1}.issuperset(mask)):
            raise RolloutError(
                f"the rollout engine gave a response of {length} tokens a response_mask of {len(mask)} entries, with "
                f"the values {sorted(set(mask))[:5]}: it needs a 0 or 1 for each token"
            )
