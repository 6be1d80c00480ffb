"""The method, top to bottom: on-policy self-distillation whose teacher reads part of the reference solution.

    alpha_t        how much of the reference the teacher reads, chosen by the exposure policy and held for H steps
    y ~ p_S(.|x)   the student answers each problem x, seeing the problem only
    L = mean over tokens of y of D( p_T(.|x, r_1..r_floor(alpha m), answer, y_<n) || p_S(.|x, y_<n) )
    the student follows the gradient of L; the policy is told what came of its alpha.

Teacher and student each make one forward a micro-batch, which stops at the hidden states; the loss, its gradient and
every statistic come from one call of `atesd_kernels.linear_divergence`. Run it with `atesd train quickstart`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from atesd.config import ATESDConfig
from atesd.data.problems import Problem
from atesd.guards import clip_fraction, response_metrics
from atesd.models.batching import assert_same_responses, chunks, hidden_rows, pack
from atesd.models.precision import settle_precision
from atesd.objectives import ResponseTokens, TokenTotals
from atesd.parallel.processes import Processes, on_cpu
from atesd.parallel.sharding import check_launcher
from atesd.reports.metrics import RunLog, peak_memory_bytes
from atesd.rollout import Rollout, RolloutError
from atesd.run import RunState


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(config: ATESDConfig) -> Path:
    """Train as `config` says and return the run directory.

    The directory holds `config.yaml`, `metrics.jsonl` (a line a step), `samples.jsonl`, `checkpoints/`, the trained
    adapter (`adapter/`, peft's format; `model/` without LoRA), `summary.json` and `report.html`. With `config.resume`
    the run continues from its last checkpoint; on a CPU the result is that of the uninterrupted run, to the last bit.

    Raises:
        ValueError: settings, problems or prompts that cannot be used, before anything is trained.
        NonFiniteLoss: after `max_nonfinite_steps` such steps in a row.
    """
    config.validate()
    settle_precision(config)
    check_launcher()
    processes = Processes(PartialState(cpu=on_cpu()))
    config.output_dir, config.bf16 = processes.told(lambda: (config.output_dir, config.bf16))  # its time and machine
    if processes.is_main:  # before anything long: whatever ends the run, it can be resumed
        config.save(config.resume or config.output_dir)
    trainer = Trainer(config)
    try:
        run_dir = trainer.run()
    finally:
        trainer.close()
    trainer.accelerator.end_training()  # after closing: vLLM in this process has process groups of its own
    return run_dir


class Trainer(RunState):
    """The loop: `run` -> `train_step` -> `distill` -> `update`."""

    def run(self) -> Path:
        """All steps from where the run stands, then the adapter, a summary and the report."""
        config, main = self.config, self.processes.is_main
        if main:
            self.log = RunLog(self.run_dir, self.start or None)
        self.accelerator.init_trackers("atesd", config=asdict(config))
        if self.start == 0 and (measured := self.evaluation.measure(0)):
            self.log.log(0, measured)
            self.accelerator.log(measured, step=0)
        if self.evaluation.failure:
            raise RolloutError(self.evaluation.failure)
        bar = tqdm(range(self.start, config.max_steps), initial=self.start, total=config.max_steps, disable=not main)
        done = self.start
        for t in bar:
            metrics, sample = self.train_step(t)
            metrics |= self.evaluation.measure(t + 1)
            done = t + 1
            stop = self.processes.told(self.guards.after_step, done, metrics)
            if main:
                self.log.log(t + 1, metrics)
                self.log.sample(t + 1, sample)
                if (t + 1) % config.logging_steps == 0:
                    self.accelerator.log(metrics, step=t + 1)
                shown = {"loss": metrics["loss"], "alpha": metrics["alpha"], "tok/s": metrics["tokens_per_second"]}
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            if done % config.save_steps == 0 or done == config.max_steps or stop or self.evaluation.failure:
                self.save(done)
            if self.evaluation.failure:
                raise RolloutError(f"{self.evaluation.failure}\n{self.how_to_go_on(done)}")
            if self.nonfinite_in_a_row >= config.max_nonfinite_steps:
                raise NonFiniteLoss(
                    f"the rollouts, the loss or its gradient were not finite in {self.nonfinite_in_a_row} steps in a "
                    f"row (the last is step {t + 1}). The batches are in {self.run_dir / 'nonfinite'}. Lower "
                    "learning_rate or max_grad_norm, or run without bf16."
                )
            if stop:
                if main:
                    tqdm.write(f"stopped after step {done}: {stop}")
                break
        write_model = self.model_writer()
        if main:
            write_model(self.run_dir / ("adapter" if config.use_peft else "model"))
            summary = {"steps": done, **self.data.counts(), **self.guards.summary(), **self.policy.finish()}
            (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            self.log.close()
            from atesd.reports.report import write_report  # here: while the run trains it does without matplotlib

            write_report(self.run_dir)
        return self.run_dir

    def train_step(self, t: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """One optimizer step: exposure, rollouts, distillation, update, outcome. Returns metrics and a sample."""
        config, started = self.config, time.perf_counter()
        self.seed_step(t)
        # y ~ p_S(.|x): every process takes its share of the step's problems
        if config.max_staleness:
            with self.timer.phase("rollout"):
                self.engine.wait()  # for what was begun a step ago
        before = [part.state_dict() for part in (self.sampler, self.engine)]
        batch = self.step_problems(self.sampler.draw)
        problems = self.processes.share(batch)
        try:
            rollouts, failure = self.roll_out(problems), None
        except RolloutError as error:
            rollouts, failure = [], error
        if self.processes.any(failure is not None):
            for part, state in zip((self.sampler, self.engine), before, strict=True):
                part.load_state_dict(state)  # the batch is still to come, and nothing else has moved
            self.save(t)
            raise RolloutError(
                f"{failure or 'the rollouts of another process failed'}\n{self.how_to_go_on(t)}"
            ) from failure
        if config.max_staleness and t + 1 < config.max_steps:  # the next y, from the student before this update
            self.engine.begin([self.prompts.student(problem) for problem in self.step_problems(self.sampler.peek)])
        with self.timer.phase("reward"):
            advantages, rewards = self.reward.advantages(problems, rollouts) if self.reward else (None, {})
        everyones = self.exposures(t, batch)
        alphas = self.processes.share(everyones)

        # What the update has to show for itself is measured before it is made
        with self.timer.phase("probe"), self.autocast():
            repeats = config.num_generations  # a problem with several responses is one problem
            outcome = self.meter.measure(t, everyones[::repeats], batch[::repeats])
        if self.processes.told(self.guards.before_update, t, outcome["probe_nll"]):
            write_model = self.model_writer()
            if self.processes.is_main:
                self.guards.write_best(write_model)
        loss, totals, num_tokens = self.distill(problems, rollouts, alphas, advantages)
        with self.timer.phase("optimizer"):
            grad_norm = self.update(loss)
        skipped = grad_norm is None
        if skipped:
            self.save_nonfinite(t, problems, rollouts, alpha=alphas[0], loss=loss)
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if skipped else 0

        totals.over(self.processes)
        stats = totals.means(num_tokens)
        # a reward in the loss would be none of the teacher's: the policy then hears the divergence alone, without clips
        heard = stats.get("mismatch", loss) if self.objective.needs_reward else loss
        measured = {"loss": heard, "mismatch": stats.get("mismatch"), "confidence": stats["student_confidence"]}
        with self.timer.phase("policy"):
            seen = (dict.fromkeys(measured) if skipped else measured) | outcome
            learned = self.policy.observe(t, **seen) if self.processes.is_main else {}
        seconds = time.perf_counter() - started
        metrics = {
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **stats,
            **clip_fraction(config, loss, totals, stats.get("mismatch")),
            **self.processes.mean(rewards | response_metrics(rollouts)),
            "num_tokens": num_tokens,
            **self.engine_mismatch.take(self.processes.gather),
            **{("grounded_score" if name == "grounded" else name): v for name, v in outcome.items() if v is not None},
            **learned,
            "skipped": int(skipped),
            "tokens_per_second": num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            **self.timer.take(),
            "seconds_step": seconds,
        }
        self.scheduler.step()
        return metrics, self.describe(problems[0], rollouts[0], alphas[0])

    def roll_out(self, problems: list[Problem]) -> list[Rollout]:
        """A response to each problem from the student as it is now (one update ago, with `max_staleness`), whoever
        generates it: y ~ p_S(.|x). Where the objective is to imitate, the reference solutions in their place."""
        prompts = [self.prompts.student(problem) for problem in problems]
        if not self.objective.needs_rollouts:
            replies = [self.prompts.reference_completion(self.references[problem.id])[0] for problem in problems]
            return [Rollout(prompt, reply, truncated=False) for prompt, reply in zip(prompts, replies, strict=True)]
        with self.timer.phase("weight_sync"):
            self.engine.sync()
        with self.timer.phase("rollout"):
            rollouts = self.engine.generate(prompts)
            self.engine.release()
        self.freed_memory.release()
        return rollouts

    def exposures(self, t: int, batch: list[Problem]) -> list[float]:
        """How much of its reference the teacher of each problem of the step reads: what the policy of the main process
        says, as far as it fits."""
        difficulty = self.difficulty
        if difficulty is None:
            with self.timer.phase("policy"):
                alphas = [self.processes.told(self.policy.alpha, t)] * len(batch)
        else:
            repeats = self.config.num_generations
            with self.timer.phase("probe"), self.autocast():
                nll = self.meter.reference_nll(self.processes.share(batch[::repeats]))
                nll = self.processes.gather(torch.tensor(nll, dtype=torch.float64, device=self.device)).tolist()
            with self.timer.phase("policy"):
                chosen = self.processes.told(lambda: self.policy.alphas(t, difficulty.normalise(nll)))
            alphas = [alpha for alpha in chosen for _ in range(repeats)]
        return [self.data.alpha(problem, alpha) for problem, alpha in zip(batch, alphas, strict=True)]

    def distill(
        self,
        problems: list[Problem],
        rollouts: list[Rollout],
        alphas: list[float],
        advantages: list[float] | None = None,
    ) -> tuple[float, TokenTotals, int]:
        """Accumulate the gradient of the objective, a mean over all response tokens of the step."""
        num_tokens = int(self.processes.total(sum(len(r.response_ids) for r in rollouts))[0])
        loss, totals = torch.zeros((), device=self.device), TokenTotals()
        if not all(r.finite for r in rollouts):
            loss += torch.nan  # a rollout the student could not sample makes no step, whatever is computed on it
        with self.autocast():  # one context for all micro-batches: each weight is cast once a step
            for part in chunks(len(rollouts), self.config.per_device_train_batch_size * self.config.num_generations):
                responses = [r.response_ids for r in rollouts[part]]
                student_batch = pack([r.prompt_ids for r in rollouts[part]], responses, self.device)
                chosen = None if advantages is None else tuple(advantages[part])
                teacher_hidden = None
                if self.objective.needs_teacher:
                    exposed = zip(problems[part], alphas[part], strict=True)
                    read = [self.prompts.teacher(p, self.references[p.id], alpha) for p, alpha in exposed]
                    teacher_batch = pack(read, responses, self.device)
                    assert_same_responses(student_batch, teacher_batch)
                    with self.timer.phase("teacher"):
                        teacher_hidden = self.teacher.hidden(teacher_batch)
                with self.timer.phase("student"):
                    student_hidden = hidden_rows(self.backbone, student_batch)
                with self.timer.phase("loss_backward"):
                    targets = student_batch.targets
                    teacher_head = None if self.teacher.shares_head else self.teacher.head
                    weight = self.engine_mismatch.measure(rollouts[part], student_hidden, self.head, targets)
                    tokens = ResponseTokens(targets, student_batch.lengths, chosen, weight)
                    # backward in two parts: the head's gradient is added up before the layers' backward begins
                    states = student_hidden.detach().requires_grad_()
                    part_loss, stats = self.objective(
                        states, self.head, teacher_hidden, teacher_head, tokens, num_tokens
                    )
                    with torch.autocast(self.device.type, enabled=False):
                        self.scaled(part_loss, loss).backward()
                        student_hidden.backward(states.grad)
                loss += part_loss.detach()
                totals.add(stats)
                self.freed_memory.release()  # of the activations: the next part's have other sizes
        return float(self.processes.sum(loss)), totals, num_tokens

    def update(self, loss: float) -> float | None:
        """Clip and step; None, and no step, where the loss or the gradient is not finite."""
        self.freed_memory.release()  # of the activations: the first step allocates the optimizer's state
        norm = self.optimizer_step(loss)
        if norm is not None:
            self.gather_head()
            self.teacher.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.freed_memory.release()
        return norm

    def save_nonfinite(self, t: int, problems: list[Problem], rollouts: list[Rollout], **numbers: float) -> None:
        """Keep the batch of a skipped step for inspection, and say where it is."""
        rank = f"-process-{self.processes.rank}" if self.processes.rank else ""
        path = self.run_dir / "nonfinite" / f"step-{t + 1}{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = {"problem_ids": [p.id for p in problems], "rollouts": [asdict(r) for r in rollouts]}
        torch.save({"step": t + 1, **numbers, **batch}, path)
        tqdm.write(
            f"step {t + 1} skipped: its rollouts, loss or gradient are not finite ({numbers}); the batch is in {path}"
        )
