"""The batches of a run: a step's problems, and the student's response to each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from atesd.data.problems import Problem
from atesd.data.run_data import RunData
from atesd.models.batching import ProblemSampler
from atesd.parallel.processes import Processes
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.engine import Rollout, RolloutEngine, RolloutError


class RolloutBatches:
    """Draws the problems of each step and has this process's share of them answered.

    Args:
        data: problems, references and prompts.
        sampler: the order in which problems are visited.
        engine: answers them; an `AheadEngine` answers the next step's while this one trains.
        processes: those that train together.
        num_generations: responses to each problem.
        from_references: the reference solutions stand in for rollouts (supervised fine-tuning).
        phase: `phase(name)` is a context that times that part of a step.

    Attributes:
        problems_per_step: of all processes.
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
        """The next step's problems, of all processes, and the responses to this process's share of them.

        Each problem stands as often as it is answered. `last`: no batch follows, so none is generated ahead.

        Raises:
            RolloutError: on every process, if the engine of one failed. Sampler and engine are then as before the
                call, so a resumed run draws the same batch.
        """
        ahead = self.engine if isinstance(self.engine, AheadEngine) else None
        if ahead:
            with self.phase("rollout"):
                ahead.wait()  # for what was begun a step ago
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
        """The problems of a step, as `sampler.draw` or `sampler.peek` chooses them."""
        train = self.data.problems.train
        return [train[i] for i in draw(self.problems_per_step) for _ in range(self.num_generations)]

    def responses(self, problems: list[Problem]) -> list[Rollout]:
        """y ~ p_S(.|x): one response to each problem, from the student as it is now (with `max_staleness`, as it was
        one update ago). The reference solutions instead where the objective imitates them."""
        prompts = [self.data.prompts.student(problem) for problem in problems]
        if self.from_references:
            replies = [self.data.prompts.reference_completion(self.data.references[p.id])[0] for p in problems]
            return [Rollout(prompt, reply, truncated=False) for prompt, reply in zip(prompts, replies, strict=True)]
        with self.phase("weight_sync"):
            self.engine.sync()
        with self.phase("rollout"):
            rollouts = self.engine.generate(prompts)
            self.engine.release()
        return rollouts
