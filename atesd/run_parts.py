"""The parts that a run is made of, built from its settings: data, models, rollouts, exposure, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from atesd.config import ATESDConfig
from atesd.config.doors import POLICY_FIELDS
from atesd.config.load import settle_paths
from atesd.data.problems import weights_of
from atesd.data.reading.leakage import TeacherWording
from atesd.data.run_data import load_run_data
from atesd.evaluation.reward import VerifierReward
from atesd.evaluation.training import TrainingEvaluation
from atesd.exposure.decisions import ExposureDecisions
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.outcomes import OutcomeMeter
from atesd.exposure.policies import make_policy
from atesd.guards import Guards
from atesd.models.batching import ProblemSampler
from atesd.models.loading import context_length, load_model, load_model_config, load_tokenizer
from atesd.models.memory import FreedMemory, bound_product_caches
from atesd.models.other_teacher import (
    check_teacher_place,
    checked_teacher_config,
    make_other_teacher,
    teacher_source,
)
from atesd.models.precision import settle_precision
from atesd.models.student import Student
from atesd.models.teachers import AnyTeacher, Teacher
from atesd.objectives import make_imitation, make_objective
from atesd.parallel.parallelism import check_launcher, make_parallelism
from atesd.parallel.processes import Processes, on_cpu
from atesd.reports.metrics import PhaseTimer
from atesd.rollout import make_engine
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.batches import RolloutBatches
from atesd.rollout.mismatch import EngineMismatch
from atesd.served_teacher.server import make_teacher_server
from atesd.served_teacher.teacher import ServedTeacher
from atesd.teacher_views import TeacherViews
from atesd.terminal import name_phase


class RunParts:
    """The parts of a run, each built by a method of its own, in the order of the methods.

    Attributes:
        config, accelerator, processes, device: where and how it runs.
        tokenizer, data: problems, references and prompts.
        student, teacher, objective: the models and the loss.
        rollout, reward, engine_mismatch: batches of rollouts, their verifier, and the engine's log-probs against ours.
        exposure: the exposure policy and the measurements it observes.
        evaluation, guards: held-out evaluations, signs of a collapse.
    """

    run_dir: Path

    def __init__(self, config: ATESDConfig):
        settle_precision(config)
        settle_paths(config)
        check_launcher()
        bound_product_caches()
        self.config = config
        self.accelerator = Accelerator(cpu=on_cpu())
        self.device, self.processes = self.accelerator.device, Processes(self.accelerator)
        self.freed_memory, self.timer = FreedMemory(keep=config.keep_freed_memory), PhaseTimer()

    def build_data(self) -> None:
        """Problems and prompts, all checked here: nothing long has been loaded yet."""
        config = self.config
        self.parallelism = make_parallelism(self.accelerator, self.processes)
        check_teacher_place(config, self.parallelism)
        set_seed(config.seed)
        with self.accelerator.local_main_process_first():  # it may have to fetch them
            self.tokenizer = load_tokenizer(config)
            teacher = checked_teacher_config(config, self.tokenizer)
        self.teacher_server = server = make_teacher_server(config, self.tokenizer, self.processes)
        of_teacher = server.context_length if server else context_length(teacher) if teacher else None
        with self.accelerator.local_main_process_first():
            context = context_length(load_model_config(config))
            self.data = load_run_data(config, self.tokenizer, context, of_teacher)
        self.weighted = weights_of(self.data.problems.train) is not None

    def build_models(self) -> None:
        config = self.config
        self.student = Student(config, load_model(config), self.tokenizer, self.parallelism)
        self.teacher = self.make_teacher()
        self.views = TeacherViews(config, self.teacher, self.data)
        self.objective, self.imitation = make_objective(config), make_imitation(config)
        self.wording = TeacherWording(self.data.prompts.templates)

    def make_teacher(self) -> AnyTeacher:
        config, student = self.config, self.student
        if self.teacher_server:
            return ServedTeacher(self.teacher_server, self.processes)
        if source := teacher_source(config):
            return make_other_teacher(config, source, student.head, self.tokenizer, self.parallelism)
        return Teacher(student.model, config.teacher, ema_decay=config.ema_decay, bf16=config.bf16)

    def build_rollout(self, opened: ExitStack) -> None:
        config = self.config
        engine = make_engine(config, self.student.model, self.tokenizer, self.processes)
        local = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.rollout = RolloutBatches(
            self.data,
            ProblemSampler(len(self.data.problems.train), config.seed),
            AheadEngine(engine) if config.max_staleness else engine,
            self.processes,
            problems_per_step=local * self.processes.count,
            num_generations=config.num_generations,
            from_references=not self.objective.needs_rollouts,
            phase=self.phase,
        )
        opened.callback(self.rollout.engine.close)  # closed last: it may take longest
        self.reward = (
            VerifierReward(self.tokenizer, config.num_generations, config.box_only)
            if self.objective.needs_reward
            else None
        )
        if self.reward:
            opened.callback(self.reward.grader.close)
        self.engine_mismatch = EngineMismatch(config.importance_clip, config.chunk_bytes)

    def build_exposure(self) -> None:
        config = self.config
        settings = {name: getattr(config, name) for name in POLICY_FIELDS}
        if config.grounding == "none":
            settings["lambda_gt"] = 0.0
        settings |= {"per_example": config.per_example_exposure, **json.loads(config.exposure_kwargs)}
        meter = OutcomeMeter(
            self.student.model,
            self.teacher,
            self.data,
            self.data.problems.probe,
            probe_every=config.probe_every,
            grounding=config.grounding,
            batch_size=config.per_device_train_batch_size,
            chunk_bytes=config.chunk_bytes,
            processes=self.processes,
        )
        self.exposure = ExposureDecisions(
            make_policy(config.exposure_policy, **settings),
            meter,
            Difficulty() if config.per_example_exposure else None,
            self.data,
            self.processes,
            num_generations=config.num_generations,
            phase=self.phase,
            autocast=self.student.autocast,
        )

    def build_evaluation(self, opened: ExitStack) -> None:
        config, data = self.config, self.data
        self.evaluation = TrainingEvaluation(
            config,
            data.problems.eval,
            data.prompts,
            self.rollout.engine,
            self.tokenizer,
            self.processes,
            self.freed_memory,
        )
        opened.callback(self.evaluation.close)
        self.guards = Guards(config, self.run_dir)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a named part of a step, and gives freed memory back around the parts that allocate most."""
        if name == "optimizer":  # its state comes on top of what the activations have left
            self.freed_memory.release()
        name_phase(name)
        with self.timer.phase(name):
            yield
        if name in ("rollout", "loss_backward", "optimizer"):
            self.freed_memory.release()
