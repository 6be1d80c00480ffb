"""Everything a run holds: built from its settings, saved into a checkpoint, and built again from one.

A resume restores the trained weights, optimizer, schedule, sampler position, count of rollouts, exposure policy with
its pending decisions, and teacher averages. No random state is saved, because every step sets its own seeds. A
checkpoint holds full tensors, independent of the number of processes. Any number that divides the batch can resume it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import filter_trackers
from accelerate.utils import set_seed

from atesd.config import CONFIG_FILE, ATESDConfig
from atesd.data.problems import Problem
from atesd.errors import AtesdError, ConfigError, first_line
from atesd.evaluation.learned import forget_answers_after
from atesd.files import replaced_folder, write_atomically, write_json
from atesd.guards import BEST
from atesd.hub import make_repository, push_folder
from atesd.inputs import INPUTS, SERVED_TEACHER, input_digests, keep_inputs
from atesd.models.loading import check_kernels
from atesd.objectives import TokenTotals
from atesd.parallel.sharding import ShardingError, gather_tensors
from atesd.planning.foreseen import disk_is_too_small, warm_up_trains_nothing
from atesd.reports.learned import ANSWERS, as_lines, read_comparison
from atesd.reports.metrics import METRICS, SAMPLES, peak_memory_bytes
from atesd.reports.model_card import model_card
from atesd.reports.report import REPORT
from atesd.resuming import (
    NONFINITE,
    PROBLEMS_PER_STEP,
    SUMMARY,
    check_settings,
    checkpoint_to_resume,
    finished_after,
    proven_step,
)
from atesd.rollout import Rollout, check_processes
from atesd.rollout.engine import ENGINE_WEIGHTS
from atesd.rollout.seeds import seed_of
from atesd.run_parts import RunParts
from atesd.step_metrics import clip_fraction, outcome_metrics, response_metrics, text_metrics
from atesd.stopping import go_on_command
from atesd.storage.checkpoint import CHECKPOINTS, CheckpointError, load_checkpoint, save_checkpoint
from atesd.storage.folder import OwnedFolder, own, own_new
from atesd.terminal import show

ADAPTER, MODEL = "adapter", "model"
# What a run writes into its folder, and must not find there when it starts.
WRITTEN = (
    *(CONFIG_FILE, INPUTS, METRICS, SAMPLES, ANSWERS, CHECKPOINTS),
    *(BEST, ADAPTER, MODEL, SUMMARY, REPORT, NONFINITE, ENGINE_WEIGHTS),
)


class Run(RunParts):
    """The parts of a run. `Run.build(config)` makes one; with `config.resume`, as its last checkpoint left it.

    Attributes, beside those of `RunParts`:
        run_dir, folder: where it writes; the folder is the main process's until `close`.
        step: updates made so far.
        nonfinite_in_a_row: skipped updates since the last one that was made.
    """

    def __init__(self, config: ATESDConfig):
        super().__init__(config)
        self.step, self.nonfinite_in_a_row = 0, 0
        self.folder: OwnedFolder | None = None
        # Use the main process's values: the default folder contains the time, and precision depends on the machine
        config.output_dir, config.bf16 = self.processes.broadcast_from_main(lambda: (self.own_folder(), config.bf16))
        self.run_dir = Path(config.output_dir)
        self.accelerator.project_configuration.set_directories(str(self.run_dir))
        trackers = None if config.report_to == "none" else config.report_to.replace(" ", "").split(",")
        self.accelerator.log_with = filter_trackers(trackers, str(self.run_dir))  # some of them write into the folder
        self.opened = ExitStack()

    def own_folder(self) -> str:
        """Makes the run's folder, or takes that of the run to resume. The main process owns it until `close`."""
        config = self.config
        if config.resume:
            self.folder = own(Path(config.resume), "resume")
        else:
            self.folder = own_new(Path(config.output_dir), WRITTEN, "output_dir", numbered=config.named_by_time)
        return str(self.folder.path)

    @classmethod
    def build(cls, config: ATESDConfig) -> Run:
        """Make all parts. What can be refused is refused before the model is loaded.

        If the start of a new run fails, its folder is removed again.

        Raises:
            ValueError: settings, problems, prompts or a launcher's settings that cannot be used.
        """
        run = cls(config)
        try:
            run.build_parts()
        except BaseException:
            if run.folder and not config.resume:
                run.folder.discard(CONFIG_FILE, INPUTS, CHECKPOINTS)
            run.close()
            raise
        return run

    def build_parts(self) -> None:
        config = self.config
        checkpoint = self.processes.broadcast_from_main(self.checkpoint_to_resume)
        if self.processes.is_main:
            if not config.resume:  # before anything long: however it ends, it can be resumed
                config.save(self.run_dir)
            (self.run_dir / CHECKPOINTS).mkdir(exist_ok=True)  # absent in a run killed right here
        check_processes(config, self.processes)
        check_kernels(config)
        with ExitStack() as opened:  # if a later part fails, stops the subprocesses of the earlier ones
            self.build_data()
            if self.teacher_server:
                opened.callback(self.teacher_server.stop)
            if self.processes.is_main:
                if not config.resume:
                    config.save(self.run_dir)  # again: with the counts of problems that were found
                show(f"run directory: {self.run_dir}")
            digests = input_digests(config, self.data, self.tokenizer)
            if self.teacher_server:
                digests[SERVED_TEACHER] = self.teacher_server.model
            self.changed_inputs = self.processes.broadcast_from_main(
                keep_inputs, self.run_dir, digests, config.allow_changed_inputs
            )
            self.build_models()
            self.build_rollout(opened)
            self.build_exposure()
            self.build_evaluation(opened)
            if checkpoint:
                self.restore(checkpoint)
            if config.resume and self.processes.is_main:
                forget_answers_after(self.run_dir, self.step)
            if config.push_to_hub:
                self.processes.broadcast_from_main(make_repository, config.push_to_hub)
            if self.processes.is_main:
                config.save(self.run_dir)  # a resume that is refused leaves the settings as they were
                self.warn_of_the_foreseen()
            if not self.is_finished():
                self.start_trackers()
            self.opened = opened.pop_all()

    def start_trackers(self) -> None:
        try:
            self.accelerator.init_trackers("atesd", config=asdict(self.config))
        except Exception as error:  # each tracker has its own
            raise ConfigError(
                f"report_to is {self.config.report_to!r}, which does not start ({type(error).__name__}: "
                f"{first_line(error)}): log in to it, or set report_to to none"
            ) from error

    def warn_of_the_foreseen(self) -> None:
        """Warns of faults that the run is sure to meet."""
        trained = self.student.trained.values()
        for found in (warm_up_trains_nothing(self.config), disk_is_too_small(self.config, self.run_dir, trained)):
            if found:
                warnings.warn(found, stacklevel=2)

    def checkpoint_to_resume(self) -> Path | None:
        """Returns the checkpoint to go on from, if any. Its settings are compared with the run's.

        Raises:
            ConfigError, CheckpointError: the run cannot go on.
        """
        config = self.config
        path = checkpoint_to_resume(self.run_dir, config.allow_older_checkpoint) if config.resume else None
        if path:
            check_settings(path, config, self.run_dir, self.processes.count)
        return path

    def restore(self, checkpoint: Path) -> None:
        """Take the state of a checkpoint, whose files the main process has verified.

        Raises:
            CheckpointError: its content does not fit the run.
        """
        state = load_checkpoint(checkpoint, verify=False)
        try:
            self.load_state_dict(state)
        except AtesdError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint} does not fit the run ({type(error).__name__}: {str(error).strip() or 'no details'}): it "
                "was written by another version of atesd or for another model. Delete it to go on from the one before"
            ) from error

    def seed_step(self, t: int) -> None:
        """Seed the global random numbers (dropout's) of step `t`: others on each process, the same on resume."""
        number = -1 - t * self.processes.count - self.processes.rank
        set_seed(seed_of(self.config.seed, number) % 2**32)

    def step_metrics(
        self,
        started: float,
        loss: float,
        grad_norm: float | None,
        num_tokens: int,
        totals: TokenTotals,
        stats: dict[str, float],
        rewards: dict[str, float],
        problems: list[Problem],
        rollouts: list[Rollout],
        outcome: dict[str, float | None],
        learned: dict[str, float],
    ) -> dict[str, Any]:
        """The step's line of metrics.jsonl. Every process calls it: some values are averaged over the processes.

        `started` is the step's start by `time.perf_counter`; `stats` are the means of `totals`.
        """
        seconds = time.perf_counter() - started
        aux_loss = totals.aux_loss()
        return {
            "loss": loss,
            **({} if aux_loss is None else {"aux_loss": aux_loss[0]}),
            **({"sft_loss": totals.imitation_loss() / self.config.sft_weight} if self.imitation else {}),
            "learning_rate": self.student.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **stats,
            **clip_fraction(self.config, totals.objective(loss), totals, stats.get("mismatch"), self.weighted),
            **self.processes.all_reduce_mean(
                rewards | response_metrics(rollouts) | text_metrics(self.tokenizer, self.wording, problems, rollouts)
            ),
            "num_tokens": num_tokens,
            **self.engine_mismatch.take(self.processes.gather),
            **outcome_metrics(outcome),
            **learned,
            "skipped": int(grad_norm is None),
            "tokens_per_second": num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **self.timer.take(),
            "seconds_step": seconds,
        }

    def stateful(self) -> dict[str, Any]:
        """The parts whose state a checkpoint holds, beside the student's."""
        parts = {
            "sampler": self.rollout.sampler,
            "engine": self.rollout.engine,
            "policy": self.exposure.policy,
            "difficulty": self.exposure.difficulty,
            "guards": self.guards,
            "teacher": self.teacher,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def undecided(self) -> dict[str, Any]:
        """A copy of the state that a step changes before its update: which problems, responses and exposures are next.
        `put_back` restores it."""
        return {name: copy.deepcopy(p.state_dict()) for name, p in self.stateful().items() if p is not self.teacher}

    def put_back(self, before: dict[str, Any]) -> None:
        for name, state in before.items():
            self.stateful()[name].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Every process makes one, since sharded tensors are gathered for it; the main process's is saved."""
        counters = {"step": self.step, "nonfinite_in_a_row": self.nonfinite_in_a_row}
        counters["problems_per_step"] = self.rollout.problems_per_step
        parts = {name: part.state_dict() for name, part in self.stateful().items()}
        return gather_tensors({**counters, **self.student.state_dict(), **parts})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.nonfinite_in_a_row = state["step"], state["nonfinite_in_a_row"]
        self.rollout.problems_per_step = state["problems_per_step"]
        if self.rollout.problems_per_step % self.processes.count:
            raise ShardingError(
                f"the run takes {self.rollout.problems_per_step} problems a step, which {self.processes.count} "
                "processes cannot share equally: resume it with a number of processes that divides them."
            )
        self.student.load_state_dict(state)
        for name, part in self.stateful().items():
            part.load_state_dict(state[name])

    def save(self) -> None:
        """Write the checkpoint of the run as it stands. Every process calls it."""
        state, adapter = self.state_dict(), self.student.writer() if self.config.use_peft else None
        if self.processes.is_main:
            keep = self.config.save_total_limit
            settings = asdict(self.config) | {PROBLEMS_PER_STEP: self.rollout.problems_per_step}
            proven = proven_step(self.step, self.nonfinite_in_a_row)
            save_checkpoint(self.run_dir, self.step, state, adapter, keep, proven, settings)
        self.processes.barrier()

    def is_finished(self) -> bool:
        """Whether there is nothing left to do: all steps are made and their results written."""
        ended = self.step >= self.config.max_steps or self.guards.stop_reason is not None
        return ended and finished_after(self.run_dir) == self.step

    def how_to_extend(self) -> str:
        if self.guards.stop_reason:
            return f": {self.guards.stop_reason}. Another early_stopping_patience or stop_on_collapse would go on"
        return f"; --max_steps {self.step + 100} would go on"

    def how_to_go_on(self) -> str:
        return f"The run is saved as it was after step {self.step}: go on with {go_on_command(self.run_dir)}"

    def save_nonfinite_batch(self, problems: list[Problem], rollouts: list[Rollout], **numbers: float) -> None:
        """Keep the batch of a skipped update, and say where it is."""
        step = self.step + 1
        rank = f"-process-{self.processes.rank}" if self.processes.rank else ""
        path = self.run_dir / NONFINITE / f"step-{step}{rank}.pt"
        path.parent.mkdir(exist_ok=True)
        batch = {"problem_ids": [p.id for p in problems], "rollouts": [asdict(r) for r in rollouts]}
        torch.save({"step": step, **numbers, **batch}, path)
        show(f"step {step} skipped: its rollouts, loss or gradient are not finite ({numbers}); the batch is in {path}")

    def write_best(self) -> None:
        """Keep these weights as the best so far. Every process calls it."""
        write = self.student.writer()
        if self.processes.is_main:
            self.guards.write_best(write)

    def finish(self) -> None:
        """Write the trained adapter (or model), summary.json and report.html. Every process calls it."""
        write: Callable[..., None] = self.student.writer()
        if not self.processes.is_main:
            return
        folder, learned = self.run_dir / (ADAPTER if self.config.use_peft else MODEL), read_comparison(self.run_dir)
        with replaced_folder(folder) as staging:
            write(staging)
            write_atomically(staging / "README.md", model_card(self.config, self.step, learned))
        summary = {"steps": self.step, **self.data.counts(), **self.guards.summary(), **self.exposure.policy.finish()}
        if self.changed_inputs:
            summary["changed_inputs"] = self.changed_inputs
        if learned:
            summary["held_out_accuracy"] = {name: learned[name] for name in ("before", "after", "change")}
        write_json(self.run_dir / SUMMARY, summary)
        from atesd.reports.report import write_report  # here: training itself does without matplotlib

        write_report(self.run_dir)
        if learned:
            show(as_lines(learned))

    def push_to_hub(self) -> None:
        """Upload the trained adapter (or model) to the repository that the settings name, if any."""
        if self.config.push_to_hub and self.processes.is_main:
            folder = self.run_dir / (ADAPTER if self.config.use_peft else MODEL)
            show(f"uploaded to {push_folder(folder, self.config.push_to_hub)}")

    def close(self) -> None:
        """End the processes that the graders and the engine have started, and give the folder up."""
        self.opened.close()
        if self.folder:
            self.folder.close()
