"""Gets the alphas of a step from the exposure policy, and reports the step's measurements to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from atesd.data.problems import Problem
from atesd.data.run_data import RunData
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.outcomes import OutcomeMeter
from atesd.exposure.policies import ExposurePolicy
from atesd.parallel.processes import Processes


class ExposureDecisions:
    """Asks the main process's policy for alpha, measures what follows, and reports it to the policy.

    Args:
        policy: the main process's decides; those of the other processes are idle.
        meter: measures the probe NLL and the teacher-grounded score.
        difficulty: rates each problem for a per-example policy; None: one alpha for the whole step.
        data: knows which problems' teacher contexts do not fit in full.
        processes: those that train together.
        num_generations: responses to each problem, which share its alpha.
        phase, autocast: contexts of the run: one times a named part of a step, the other sets the precision.
    """

    def __init__(
        self,
        policy: ExposurePolicy,
        meter: OutcomeMeter,
        difficulty: Difficulty | None,
        data: RunData,
        processes: Processes,
        *,
        num_generations: int,
        phase: Callable[[str], AbstractContextManager[None]],
        autocast: Callable[[], AbstractContextManager[None]],
    ):
        self.policy, self.meter, self.difficulty, self.data = policy, meter, difficulty, data
        self.processes, self.num_generations, self.phase, self.autocast = processes, num_generations, phase, autocast

    def alphas(self, t: int, batch: list[Problem]) -> list[float]:
        """alpha of each problem of step `t`, capped where the teacher's context would not fit.

        `batch` holds the problems of all processes, each `num_generations` times in a row.
        """
        repeats, difficulty = self.num_generations, self.difficulty
        if difficulty is None:
            with self.phase("policy"):
                alphas = [self.processes.broadcast_from_main(self.policy.alpha, t)] * len(batch)
        else:
            with self.phase("probe"), self.autocast():
                local = self.meter.reference_nll(self.processes.local_block(batch[::repeats]))
                nll = torch.tensor(local, dtype=torch.float64, device=self.meter.device)
                nll = self.processes.gather(nll).tolist()
            with self.phase("policy"):
                chosen = self.processes.broadcast_from_main(lambda: self.policy.alphas(t, difficulty.normalise(nll)))
            alphas = [alpha for alpha in chosen for _ in range(repeats)]
        return [self.data.alpha(problem, alpha) for problem, alpha in zip(batch, alphas, strict=True)]

    def measure(self, t: int, alphas: list[float], batch: list[Problem]) -> dict[str, float | None]:
        """`{"probe_nll": ..., "grounded": ...}` of the weights as they are; None for what is not due at step `t`."""
        with self.phase("probe"), self.autocast():
            return self.meter.measure(t, alphas[:: self.num_generations], batch[:: self.num_generations])

    def observe(self, t: int, measured: Mapping[str, float | None]) -> dict[str, float]:
        """Report step `t` to the policy. Returns its metrics on the main process, {} on the others."""
        with self.phase("policy"):
            return self.policy.observe(t, **measured) if self.processes.is_main else {}
