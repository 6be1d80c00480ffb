"""The method, top to bottom: on-policy self-distillation whose teacher reads part of the reference solution.

    y ~ p_S(.|x)   the student answers each problem x, seeing the problem only
    alpha_t        how much of the reference the teacher reads, chosen by the exposure policy and held for H steps
    L = mean over tokens of y of D( p_T(.|x, r_1..r_floor(alpha m), answer, y_<n) || p_S(.|x, y_<n) )
    update the student with the gradient of L; report to the policy what followed from its alpha

Teacher and student each make one forward a micro-batch, which stops at the hidden states. The loss, its gradient and
every statistic come from one call of `atesd_kernels.linear_divergence`, or, where a server teaches by its top tokens,
of `linear_topk_divergence`. Run it with `atesd train quickstart`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.data.problems import Problem, weights_of
from atesd.gradients import add_gradient, add_imitation
from atesd.models.batching import chunks, hidden_rows_and_aux_loss
from atesd.models.top_entries import TopEntries
from atesd.objectives import ResponseTokens, TokenTotals
from atesd.reports.step_log import StepLog
from atesd.resuming import NonFiniteLoss, diverged, named_storage_faults
from atesd.rollout import Rollout, RolloutError
from atesd.rollout.batches import pack_rollouts
from atesd.run import Run
from atesd.step_metrics import policy_signals, sample_line
from atesd.stopping import Stopped, StopSignals
from atesd.terminal import show


def train(config: ATESDConfig) -> Path:
    """Train as `config` says and return the run directory.

    The directory holds `config.yaml`, `metrics.jsonl` (a line a step), `samples.jsonl`, `checkpoints/`, the trained
    adapter (`adapter/`, peft's format; `model/` without LoRA), `summary.json` and `report.html`. With `config.resume`
    the run continues from its last checkpoint; on a CPU the result is that of the uninterrupted run, to the last bit.

    Raises:
        ValueError: settings, problems or prompts that cannot be used, before anything is trained.
        NonFiniteLoss: after `max_nonfinite_steps` such steps in a row.
        StorageError: the disk is full or cannot be written to; the last checkpoint is valid.
        HubError: `push_to_hub` failed. At the end of a run: the run is complete.
    """
    config.validate()
    run = Run.build(config)
    try:
        with named_storage_faults(run.run_dir):
            Trainer(run).train()
    finally:
        run.close()
    run.accelerator.end_training()  # after closing: vLLM in this process has process groups of its own
    run.push_to_hub()
    return run.run_dir


class Trainer:
    """The loop: `train` -> `train_step` -> `distill` -> `update`."""

    def __init__(self, run: Run):
        self.run, self.signals = run, StopSignals()
        self.log: StepLog | None = None

    def train(self) -> Path:
        """All steps from where the run stands, then the adapter, a summary and the report. Returns the run's folder."""
        run, config = self.run, self.run.config
        if run.is_finished():
            show(f"the run is finished after step {run.step}{run.how_to_extend()}")
            return run.run_dir
        self.log = log = StepLog(run.run_dir, run.accelerator, run.step, config.logging_steps)
        if run.step == 0 and (measured := run.evaluation.measure(0)):
            log.before_training(measured)
        if run.evaluation.failure:
            run.save()
            raise RolloutError(f"{run.evaluation.failure}\n{run.how_to_go_on()}")
        with self.signals.deferred():
            for t in log.steps(run.step if run.guards.stop_reason else config.max_steps):
                metrics, sample = self.train_step(t)
                run.step = t + 1
                metrics |= run.evaluation.measure(run.step)
                stop, signal = run.processes.broadcast_from_main(self.reasons_to_stop, metrics)
                log.step(run.step, metrics, sample)
                failure = run.evaluation.failure
                last = run.step == config.max_steps
                if run.step % config.save_steps == 0 or last or stop or failure or signal:
                    log.sync()
                    run.save()
                if failure:
                    raise RolloutError(f"{failure}\n{run.how_to_go_on()}")
                self.check_finite()
                if signal and not last and not stop:
                    raise Stopped(run.how_to_go_on(), signal)
                if stop:
                    log.note(f"stopped after step {run.step}: {stop}")
                    break
        run.finish()
        log.close()
        return run.run_dir

    def reasons_to_stop(self, metrics: dict[str, Any]) -> tuple[str | None, int | None]:
        """What the guards found, and the number of a signal that came during the step."""
        return self.run.guards.after_step(self.run.step, metrics), self.signals.received

    def train_step(self, t: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """One optimizer step. Returns its metrics and a sample.

        If the rollout engine or the teacher's server fails, the run is saved as it was before the step.
        """
        run, started = self.run, time.perf_counter()
        before: dict[str, Any] = {}  # failed rollouts put back themselves what they took
        if run.teacher.remote:
            with run.phase("rollout"):  # it waits for those that are generated ahead
                before = run.undecided()
        try:
            return self.step(t, started)
        except RolloutError as error:
            run.put_back(before)
            if self.log:
                self.log.sync()
            run.save()
            raise RolloutError(f"{error}\n{run.how_to_go_on()}") from error

    def step(self, t: int, started: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rollouts come first: they do not depend on alpha, and if they fail, nothing has been decided yet."""
        run = self.run
        run.seed_step(t)
        batch, rollouts = self.roll_out(t)  # `batch`: the problems of all processes; `rollouts`: this one's
        problems = run.processes.local_block(batch)
        with run.phase("reward"):
            advantages, rewards = run.reward.advantages(problems, rollouts) if run.reward else (None, {})

        alphas = run.exposure.alphas(t, batch)
        outcome = run.exposure.measure(t, alphas, batch)  # before the update: this is the outcome of the previous step
        if run.processes.broadcast_from_main(run.guards.before_update, t, outcome["probe_nll"]):
            run.write_best()

        local_alphas = run.processes.local_block(alphas)
        loss, totals, num_tokens = self.distill(problems, rollouts, local_alphas, advantages)
        grad_norm = self.update(loss)
        skipped = grad_norm is None
        if skipped:
            run.save_nonfinite_batch(problems, rollouts, alpha=local_alphas[0], loss=loss)
        run.nonfinite_in_a_row = run.nonfinite_in_a_row + 1 if skipped else 0

        totals.over(run.processes)
        stats = totals.means(num_tokens)
        signals = policy_signals(totals.objective(loss), stats, run.objective.needs_reward, skipped)
        learned = run.exposure.observe(t, signals | outcome)
        metrics = run.step_metrics(
            started, loss, grad_norm, num_tokens, totals, stats, rewards, problems, rollouts, outcome, learned
        )
        run.student.scheduler.step()
        exposed = run.data.exposed(problems[0], local_alphas[0])
        return metrics, sample_line(run.tokenizer, problems[0], exposed, rollouts[0], local_alphas[0])

    def roll_out(self, t: int) -> tuple[list[Problem], list[Rollout]]:
        """The step's problems and responses, y ~ p_S(.|x)."""
        return self.run.rollout.next(last=t + 1 == self.run.config.max_steps)

    def distill(
        self,
        problems: list[Problem],
        rollouts: list[Rollout],
        alphas: list[float],
        advantages: list[float] | None = None,
    ) -> tuple[float, TokenTotals, int]:
        """Accumulate the gradient of the objective, a mean over all response tokens of the step (`gradients.py`).

        Returns the loss and the number of response tokens, both of all processes, and this one's token statistics.
        """
        run, config = self.run, self.run.config
        counts = run.processes.all_reduce_sum(sum(r.num_tokens for r in rollouts), len(rollouts))
        num_tokens = max(1, int(counts[0]))  # a step in which no token counts has loss 0
        mean_length = num_tokens / counts[1] if config.loss_aggregation == "sequence" else None
        parts = list(chunks(len(rollouts), config.per_device_train_batch_size * config.num_generations))
        reference_tokens = 0
        if run.imitation:
            mine = sum(len(reply) for part in parts for reply in run.data.imitated(problems[part])[1])
            reference_tokens = int(run.processes.all_reduce_sum(mine)[0])
        if run.objective.needs_teacher:
            with run.phase("teacher"):
                run.views.prepare(problems, alphas, rollouts)
        loss, totals = torch.zeros((), device=run.device), TokenTotals()
        if not all(r.finite for r in rollouts):
            loss += torch.nan  # the student could not be sampled: skip the step, whatever the loss comes to
        with run.student.autocast():  # one context for all micro-batches: each weight is cast once a step
            for part in parts:
                student_batch = pack_rollouts([r.prompt_ids for r in rollouts[part]], rollouts[part], run.device)
                views: list[Tensor | TopEntries] = []
                if run.objective.needs_teacher:
                    with run.phase("teacher"):
                        views = run.views.hidden(problems[part], alphas[part], rollouts[part], student_batch)
                with run.phase("student"):
                    student_hidden, aux = hidden_rows_and_aux_loss(run.student.backbone, student_batch)
                with run.phase("loss_backward"):
                    weight = run.engine_mismatch.measure(
                        rollouts[part], student_hidden, run.student.head, student_batch.targets
                    )
                    rewarded = None if advantages is None else tuple(advantages[part])
                    factors = (weight, mean_length, weights_of(problems[part]))
                    tokens = ResponseTokens(student_batch.targets, student_batch.lengths, rewarded, *factors)
                    arguments = (student_hidden, views, aux, tokens, num_tokens, totals, loss)
                    loss += add_gradient(run, run.objective, *arguments)
                if run.imitation:
                    loss += add_imitation(run, problems[part], reference_tokens, totals, loss)
        return float(run.processes.all_reduce(loss)), totals, num_tokens

    def update(self, loss: float) -> float | None:
        """Clip and step. Returns the gradient's norm; None, and no step, if it or the loss is not finite."""
        run = self.run
        with run.phase("optimizer"):
            norm = run.student.step(loss)
            if norm is not None:
                run.teacher.update()
        return norm

    def check_finite(self) -> None:
        """Raises NonFiniteLoss after `max_nonfinite_steps` skipped steps in a row."""
        run = self.run
        if run.nonfinite_in_a_row >= run.config.max_nonfinite_steps:
            raise NonFiniteLoss(
                run.processes.broadcast_from_main(diverged, run.run_dir, run.step, run.nonfinite_in_a_row)
            )
