"""Evaluation during training, every `eval_steps`, on held-out problems with the run's prompts.

Evaluation does not affect training: samples have their own seeds, and the global random state is not used. A run with
evaluations trains exactly like a run without.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from atesd.config import ATESDConfig
from atesd.data.problems import Problem
from atesd.data.prompts import PromptBuilder
from atesd.evaluation.answers import EvalProtocol, Sample, answers, summarise
from atesd.evaluation.grading.grader import Grader
from atesd.evaluation.learned import CONFIDENCE, NUM_BOOTSTRAP, keep_answers
from atesd.models.memory import FreedMemory
from atesd.parallel.processes import Processes
from atesd.rollout import RolloutEngine, RolloutError
from atesd.terminal import progress

ANSWERS_AT_ONCE = 16


class TrainingEvaluation:
    """Evaluates the current student. Each process answers its own subset of the problems.

    Args:
        config: `eval_steps` 0 disables evaluation.
        problems: held-out problems of the run's data, already checked to fit with their answers.
        prompts, engine, tokenizer, processes, freed_memory: those of the run.

    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(
        self,
        config: ATESDConfig,
        problems: list[Problem],
        prompts: PromptBuilder,
        engine: RolloutEngine,
        tokenizer: Any,
        processes: Processes,
        freed_memory: FreedMemory,
    ):
        self.every, self.last, self.on_start = config.eval_steps, config.max_steps, config.eval_on_start
        self.failure: str | None = None  # why the last evaluation failed; the trainer then saves and stops the run
        if not self.every:
            return
        self.engine, self.tokenizer, self.processes = engine, tokenizer, processes
        self.freed_memory = freed_memory
        length = config.eval_completion_length
        self.protocol = EvalProtocol(
            config.eval_k, length, config.eval_temperature, 1.0, 0, config.seed, batch_size=ANSWERS_AT_ONCE
        )
        self.run_dir, self.all_problems = Path(str(config.output_dir)), problems
        self.problems = problems[processes.rank :: processes.count]
        self.prompts = [prompts.student(problem) for problem in self.problems]
        self.grader = Grader(box_only=config.box_only)

    def close(self) -> None:
        if self.every:
            self.grader.close()

    def measure(self, step: int) -> dict[str, Any]:
        """Evaluates after `step` updates if an evaluation is due. Call it on every process.

        Returns the metrics over all problems on the main process: `eval_average` (Average@k), `eval_pass`, `eval_maj`,
        ... Returns {} on the others, and everywhere if none is due or the engine fails; `failure` then says why."""
        if not self.every or not (step % self.every == 0 or step == self.last) or (step == 0 and not self.on_start):
            return {}
        started = time.perf_counter()
        mine: list[Sample] = []
        try:
            self.engine.sync()
            number, hidden = len(self.problems) * self.protocol.k, not self.processes.is_main
            with progress("evaluation", number, hidden=hidden):
                for batch in answers(
                    self.problems, self.prompts, self.engine, self.tokenizer, self.grader, self.protocol
                ):
                    mine += batch
        except RolloutError as error:
            self.failure = str(error)
        if self.processes.any(self.failure is not None):
            self.failure = self.failure or "the evaluation of another process failed"
            return {}
        samples: list[Sample] = gather_object(mine)
        self.engine.release()
        self.freed_memory.release()
        if not self.processes.is_main:
            return {}
        keep_answers(self.run_dir, step, self.all_problems, samples)
        found = summarise(samples, self.protocol.k, self.grader, CONFIDENCE, NUM_BOOTSTRAP)["metrics"]
        average = found[f"average@{self.protocol.k}"]
        named = {"eval_average": average["value"], "eval_average_low": average["low"]}
        named |= {"eval_average_high": average["high"], "eval_maj": found[f"maj@{self.protocol.k}"]["value"]}
        named["eval_pass"] = found.get(f"pass@{self.protocol.k}", average)["value"]
        named |= {f"eval_{name}": found[name]["value"] for name in ("response_length", "truncated", "no_answer")}
        return {**named, "seconds_eval": time.perf_counter() - started}
