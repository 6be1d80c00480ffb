"""Everything a run holds: built from its settings, saved into a checkpoint, and built again from one.

Separate from the trainer so that the loop reads as the method. What is listed here is what resume brings back: trained
weights, optimizer, schedule, sampler position, the count of rollouts, exposure policy with its pending decisions, and
teacher averages. No random state is saved, since every step begins with seeds of its own. A checkpoint holds whole
tensors and nothing of how many processes there were: it is resumed on any number, with the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import get_scheduler

from atesd.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from atesd.config import ATESDConfig
from atesd.data.context import exposed_text
from atesd.data.problems import Problem
from atesd.data.run_data import load_run_data
from atesd.evaluation.reward import VerifierReward
from atesd.evaluation.training import TrainingEvaluation
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.outcomes import OutcomeMeter
from atesd.exposure.policies import make_policy
from atesd.guards import Guards
from atesd.models.adapters import adapter_layers, inputs_cast_by_autocast
from atesd.models.batching import ProblemSampler
from atesd.models.loading import check_kernels, context_length, load_model, load_model_config, load_tokenizer
from atesd.models.memory import FreedMemory, bound_product_caches
from atesd.models.packed_attention import check_packing, use_packed_attention
from atesd.models.precision import fast_fp32_products, settle_precision
from atesd.models.teachers import Teacher
from atesd.objectives import make_objective
from atesd.parallel.processes import Processes, on_cpu
from atesd.parallel.sharding import (
    ShardingError,
    asked_for,
    check_launcher,
    cut_like,
    fsdp_plugin,
    in_shards,
    optimizer_state_like,
    reshard,
    shard,
    whole,
    writer,
)
from atesd.reports.metrics import PhaseTimer
from atesd.rollout import Rollout, check_processes, make_engine
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.mismatch import EngineMismatch
from atesd.rollout.seeds import seed_of
from atesd_kernels.integrations.head import check_head, hidden_states_and_head, unwrap
from atesd_kernels.integrations.sharded_head import gather_head, reduce_head_gradient

POLICY_FIELDS = (
    "max_steps hold_window lookahead policy_batch_size reward_gamma lambda_gt progress_signal alpha_min alpha_max "
    "policy_learning_rate policy_hidden_size entropy_target entropy_coef fixed_alpha seed"
).split()


class RunState:
    """The parts of a run, by the names the loop uses. With `config.resume`, as its last checkpoint left them."""

    def __init__(self, config: ATESDConfig):
        with ExitStack() as opened:  # what has been started is ended where something after it cannot be made
            self.build(config, opened)
            self.opened = opened.pop_all()

    def build(self, config: ATESDConfig, opened: ExitStack) -> None:
        settle_precision(config)
        check_launcher()
        self.config = config
        bound_product_caches()
        self.freed_memory = FreedMemory(keep=config.keep_freed_memory)
        self.run_dir = Path(config.resume or config.output_dir)
        trackers = None if config.report_to == "none" else config.report_to.replace(" ", "").split(",")
        self.accelerator = Accelerator(cpu=on_cpu(), log_with=trackers, project_dir=str(self.run_dir))
        self.device, self.processes = self.accelerator.device, Processes(self.accelerator)
        check_processes(config, self.processes)
        check_kernels(config)
        plugin = fsdp_plugin(self.accelerator)
        self.sharded, self.zero = plugin is not None, None
        set_seed(config.seed)

        # Problems and prompts, checked before anything long is loaded or run
        with self.accelerator.local_main_process_first():  # which may have to fetch them
            self.tokenizer = load_tokenizer(config)
            self.data = load_run_data(config, self.tokenizer, context_length(load_model_config(config)))
        self.problems, self.references, self.prompts = self.data.problems, self.data.references, self.data.prompts
        self.sampler = ProblemSampler(len(self.problems.train), config.seed)
        own = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.problems_per_step = own * self.processes.count

        # The student, its rollouts, the teacher and the objective
        model = load_model(config)
        use_packed_attention(unwrap(model))
        self.model = model if self.sharded else model.to(self.device)
        if self.sharded:
            shard(self.model, plugin, self.device)
            self.gather_head()
        # flash-attention has no float32 form
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.attn_implementation != "sdpa"):
            check_head(self.model)
            check_packing(self.model)
        reshard(self.model)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # no temporary the size of the model
        )
        if asked_for("ACCELERATE_USE_DEEPSPEED") and self.processes.count > 1:
            from atesd.parallel.zero import Zero

            self.zero = Zero(self.model, self.optimizer, config.max_grad_norm, self.device)
        self.backbone, self.head = hidden_states_and_head(self.model)
        if self.zero:
            self.backbone, self.head = self.zero.backbone_and_head(self.head)
        self.adapter_layers = adapter_layers(self.model) if config.bf16 and not config.lora_dropout else []
        self.teacher = Teacher(self.model, config.teacher, ema_decay=config.ema_decay, bf16=config.bf16)
        self.meter = OutcomeMeter(
            self.model,
            self.teacher,
            self.prompts,
            self.references,
            self.problems.probe,
            probe_every=config.probe_every,
            grounding=config.grounding,
            batch_size=config.per_device_train_batch_size,
            chunk_bytes=config.chunk_bytes,
            processes=self.processes,
        )
        self.objective = make_objective(config)
        engine = make_engine(config, self.model, self.tokenizer, self.processes)
        self.engine = AheadEngine(engine) if config.max_staleness else engine
        opened.callback(self.engine.close)  # ended last: it may take longest
        self.reward = VerifierReward(self.tokenizer, config.num_generations) if self.objective.needs_reward else None
        if self.reward:
            opened.callback(self.reward.grader.close)
        self.engine_mismatch = EngineMismatch(config.importance_clip, config.chunk_bytes)
        self.evaluation = TrainingEvaluation(
            config, self.problems.eval, self.prompts, self.engine, self.tokenizer, self.processes, self.freed_memory
        )
        opened.callback(self.evaluation.close)

        # The schedule; and what the main process decides, of which the others' own is idle
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, config.warmup_steps, num_training_steps=config.max_steps
        )
        settings = {name: getattr(config, name) for name in POLICY_FIELDS}
        if config.grounding == "none":
            settings["lambda_gt"] = 0.0
        self.policy = make_policy(config.exposure_policy, per_example=config.per_example_exposure, **settings)
        self.difficulty = Difficulty() if config.per_example_exposure else None
        self.guards = Guards(config, self.run_dir)
        self.timer = PhaseTimer()
        self.start, self.nonfinite_in_a_row = 0, 0
        checkpoint = self.processes.told(lambda: latest_checkpoint(self.run_dir) if config.resume else None)
        if checkpoint is not None:
            self.load_state_dict(load_checkpoint(checkpoint))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of every forward. A new context each time: weights cast in it live as long as it does, unless
        they are sharded: then they do not live longer than they are lent."""
        cached = not in_shards(self.model)
        with (
            fast_fp32_products(self.device),
            inputs_cast_by_autocast(self.adapter_layers),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=cached),
        ):
            yield

    def seed_step(self, t: int) -> None:
        """Global random numbers (dropout's) of step `t`: other ones on each process, the same ones after a resume."""
        set_seed(seed_of(self.config.seed, -1 - t * self.processes.count - self.processes.rank) % 2**32)

    def scaled(self, part_loss: Tensor, so_far: Tensor) -> Tensor:
        """A micro-batch's loss as its backward needs it, after losses of the sum `so_far`."""
        return self.zero.scaled(part_loss, so_far) if self.zero else part_loss

    def optimizer_step(self, loss: float) -> float | None:
        """Clip and step; the gradient's norm, or None and no step where it or the loss is not finite."""
        if self.zero:
            return self.zero.step()
        norm = self.gradient_norm()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:  # without gradients a step changes nothing; the schedule follows the count of all steps
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        return norm if finite else None

    def gradient_norm(self) -> float:
        """Of the gradients of one large batch, which are there then, and clipped. Each process has those of its share
        before; where FSDP2 shards the weights it has summed them in backward, but for the head's."""
        if self.sharded:
            if unwrap(self.model).get_output_embeddings().weight.requires_grad:
                reduce_head_gradient(self.model)
        elif self.processes.count > 1:
            for p in self.trained.values():
                p.grad = self.processes.sum(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        return float(norm.full_tensor() if self.sharded else norm)

    def gather_head(self) -> None:
        """The head's weight whole, as its shards are now, where it is trained and sharded."""
        if self.zero:
            self.zero.gather_head()
        elif self.sharded and unwrap(self.model).get_output_embeddings().weight.requires_grad:
            gather_head(self.model)

    def stateful(self) -> dict[str, Any]:
        """All that a continued run needs besides the trained weights and the random states."""
        names = ("optimizer", "scheduler", "sampler", "engine", "policy", "difficulty", "guards", "teacher")
        parts = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return parts | ({"optimizer": self.zero} if self.zero else {})  # which knows what the shards are of

    def model_writer(self) -> Callable[..., None]:
        """Writes the adapter, or the model with its tokenizer, into a folder. All processes make one, the main one
        calls it."""
        write = writer(self.model, self.trained)
        if self.config.use_peft:
            return write

        def write_whole(folder: Path) -> None:  # a folder that loads by itself
            write(folder)
            self.tokenizer.save_pretrained(folder)

        return write_whole

    def step_problems(self, draw: Callable[[int], list[int]]) -> list[Problem]:
        """A step's problems, of all processes, each as often as it is answered."""
        return [
            self.problems.train[i] for i in draw(self.problems_per_step) for _ in range(self.config.num_generations)
        ]

    def how_to_go_on(self, step: int) -> str:
        return f"The run is saved as it was after step {step}: go on with atesd train --resume {self.run_dir}"

    def describe(self, problem: Problem, rollout: Rollout, alpha: float) -> dict[str, Any]:
        """A line of samples.jsonl."""
        text = self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        exposed = exposed_text(self.references[problem.id], alpha)
        sample = {"problem_id": problem.id, "problem": problem.problem, "answer": problem.answer, "response": text}
        return sample | {"truncated": rollout.truncated, "alpha": alpha, "exposed": exposed}

    def state_dict(self, step: int) -> dict[str, Any]:
        """All processes make one, for sharded tensors are gathered in it; the main one's is saved."""
        parts = {name: part.state_dict() for name, part in self.stateful().items()}
        counters = {"step": step, "nonfinite_in_a_row": self.nonfinite_in_a_row}
        return whole({**counters, "problems_per_step": self.problems_per_step, "trained": self.trained, **parts})

    def save(self, step: int) -> None:
        """The checkpoint of the run after `step` steps: gathered by all processes, written by the main one."""
        state, adapter = self.state_dict(step), self.model_writer() if self.config.use_peft else None
        if self.processes.is_main:
            save_checkpoint(self.run_dir, step, state, adapter, self.config.save_total_limit)
        self.processes.wait()

    def close(self) -> None:
        """End what has processes of its own: the graders and the engine."""
        self.opened.close()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.nonfinite_in_a_row = state["step"], state["nonfinite_in_a_row"]
        self.problems_per_step = state["problems_per_step"]
        if self.problems_per_step % self.processes.count:
            raise ShardingError(
                f"the run takes {self.problems_per_step} problems a step, which {self.processes.count} processes "
                "cannot share equally: resume it with a number of processes that divides them."
            )
        with torch.no_grad():
            for name, p in self.trained.items():
                if self.zero:
                    self.zero.load_weight(p, state["trained"][name])
                else:
                    p.copy_(cut_like(state["trained"][name], p))
        self.gather_head()
        if not self.zero:
            state["optimizer"] = optimizer_state_like(state["optimizer"], self.optimizer)
        for name, part in self.stateful().items():
            part.load_state_dict(state[name])
        # the settings that `--resume` may change, over what optimizer and schedule have saved of them
        self.scheduler.base_lrs = [self.config.learning_rate] * len(self.scheduler.base_lrs)
        for group, rate, shape in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = rate * shape(self.scheduler.last_epoch)
