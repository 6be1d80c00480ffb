"""Everything a run holds: built from its settings, saved into a checkpoint, and built again from one.

Separate from the trainer so that the loop reads as the method. What is listed here is what resume brings back: trained
weights, optimizer, schedule, sampler position, rollout generator, exposure policy with its pending decisions, teacher
averages and every global random state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import get_scheduler

from atesd.batching import ProblemSampler
from atesd.checkpoint import latest_checkpoint, load_checkpoint
from atesd.config import ATESDConfig
from atesd.difficulty import Difficulty
from atesd.eval_training import TrainingEvaluation
from atesd.guards import Guards
from atesd.metrics import PhaseTimer
from atesd.models import context_length, load_model, load_model_config, load_tokenizer
from atesd.objectives import make_objective
from atesd.outcomes import OutcomeMeter
from atesd.packed_attention import check_packing, use_packed_attention
from atesd.policies import make_policy
from atesd.precision import settle_precision
from atesd.problems import Problem
from atesd.reward import VerifierReward
from atesd.rollout import make_engine
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.mismatch import EngineMismatch
from atesd.run_data import load_run_data
from atesd.teachers import Teacher
from atesd_kernels.integrations.head import check_head, hidden_states_and_head, unwrap

POLICY_FIELDS = (
    "max_steps hold_window lookahead policy_batch_size reward_gamma lambda_gt progress_signal alpha_min alpha_max "
    "policy_learning_rate policy_hidden_size entropy_target entropy_coef fixed_alpha seed"
).split()


class RunState:
    """The parts of a run, by the names the loop uses. With `config.resume`, as its last checkpoint left them."""

    def __init__(self, config: ATESDConfig):
        settle_precision(config)
        self.config = config
        self.run_dir = Path(config.resume or config.output_dir)
        trackers = None if config.report_to == "none" else config.report_to.replace(" ", "").split(",")
        self.accelerator = Accelerator(log_with=trackers, project_dir=str(self.run_dir))
        self.device, rank = self.accelerator.device, self.accelerator.process_index
        set_seed(config.seed)

        # Problems and prompts, checked before anything long is loaded or run
        self.tokenizer = load_tokenizer(config)
        self.data = load_run_data(config, self.tokenizer, context_length(load_model_config(config)))
        self.problems, self.references, self.prompts = self.data.problems, self.data.references, self.data.prompts
        self.sampler = ProblemSampler(len(self.problems.train), config.seed)

        # The student, its rollouts, the teacher and the objective
        model = load_model(config)
        use_packed_attention(unwrap(model))
        self.model = model.to(self.device)
        # flash-attention has no float32 form
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.attn_implementation == "flash_attention_2"
        ):
            check_head(self.model)
            check_packing(self.model)
        self.backbone, self.head = hidden_states_and_head(self.model)
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
        )
        self.objective = make_objective(config)
        self.reward = VerifierReward(self.tokenizer, config.num_generations) if self.objective.needs_reward else None
        engine = make_engine(config, self.model, self.tokenizer, rank)
        self.engine = AheadEngine(engine) if config.max_staleness else engine
        self.engine_mismatch = EngineMismatch(config.importance_clip)
        self.evaluation = TrainingEvaluation(
            config, self.problems.eval, self.prompts, self.engine, self.tokenizer, self.accelerator
        )

        # The optimizer, and the exposure policy: the same on every process, since it sees the same numbers
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # no temporary the size of the model
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, config.warmup_steps, num_training_steps=config.max_steps
        )
        settings = {name: getattr(config, name) for name in POLICY_FIELDS}
        if config.grounding == "none":
            settings["lambda_gt"] = 0.0
        self.policy = make_policy(config.exposure_policy, per_example=config.per_example_exposure, **settings)
        self.difficulty = Difficulty(self.meter.reference_nll, self.gather) if config.per_example_exposure else None
        self.guards = Guards(config, self.run_dir)
        self.timer = PhaseTimer()
        self.start, self.nonfinite_in_a_row = 0, 0
        checkpoint = latest_checkpoint(self.run_dir) if config.resume else None
        if checkpoint is not None:
            self.load_state_dict(load_checkpoint(checkpoint))

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of every forward. A new context each time: weights cast in it live as long as it does."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def stateful(self) -> dict[str, Any]:
        """All that a continued run needs besides the trained weights and the random states."""
        names = ("optimizer", "scheduler", "sampler", "engine", "policy", "difficulty", "guards", "teacher")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def problems_of(self, draw: Callable[[int], list[int]]) -> list[Problem]:
        """This process's share of a step's problems, each as often as it is answered."""
        count = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        drawn = draw(count * processes)[rank * count : (rank + 1) * count]
        return [self.problems.train[i] for i in drawn for _ in range(self.config.num_generations)]

    def gather(self, values: list[float]) -> list[float]:
        """The values of all processes, in order of rank; every process has as many."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.gather(mine).tolist()

    def state_dict(self, step: int) -> dict[str, Any]:
        trained = {name: p.detach() for name, p in self.trained.items()}
        parts = {name: part.state_dict() for name, part in self.stateful().items()}
        counters = {"step": step, "nonfinite_in_a_row": self.nonfinite_in_a_row}
        return {**counters, "trained": trained, "random": random_states(), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.nonfinite_in_a_row = state["step"], state["nonfinite_in_a_row"]
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(state["trained"][name])
        for name, part in self.stateful().items():
            part.load_state_dict(state[name])
        # the settings that `--resume` may change, over what optimizer and schedule have saved of them
        self.scheduler.base_lrs = [self.config.learning_rate] * len(self.scheduler.base_lrs)
        for group, rate, shape in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = rate * shape(self.scheduler.last_epoch)
        set_random_states(state["random"])


def random_states() -> dict[str, Any]:
    """Python's, numpy's, torch's and, where used, each GPU's."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Continue from what `random_states` gave."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
