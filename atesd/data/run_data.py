"""Loads the problems, references and prompts of a run, and handles problems that do not fit the context.

Needs no model, so `--dry-run` and the sweep load exactly the data of a run. All checks happen before slow loading.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from atesd.config import ATESDConfig
from atesd.config.mixture import STUDENT, views_of
from atesd.data.problems import Problem, ProblemSplits, load_problems, weights_of
from atesd.data.prompts import PromptBuilder, PromptTemplates, PromptTooLong
from atesd.data.reading.context import exposed_text
from atesd.data.reading.shown import ShownReferences
from atesd.data.segmentation import Reference, split_reference
from atesd.errors import DataError

ENOUGH = 8  # problems whose prompts tell whether student and teacher read the same


@dataclass(frozen=True)
class RunData:
    """Training, probe and evaluation data of a run.

    Attributes:
        problems: the splits. All of their problems fit the context.
        references: {problem id: reference split into segments}.
        prompts: builds the token ids.
        shown: what the teacher reads of each problem's reference, or of another's.
        exposure_limit: {problem id: largest alpha whose teacher prompt fits}, for problems where it is below 1
            (`overlong_problems: cut`).
        too_long: number of problems dropped because they do not fit (`overlong_problems: skip` or `cut`).
        other_teacher: whether another model teaches.
        reads_nothing: whether the teacher reads no reference, from any of its views.
    """

    problems: ProblemSplits
    references: dict[str, Reference]
    prompts: PromptBuilder
    shown: ShownReferences
    exposure_limit: dict[str, float]
    too_long: int
    other_teacher: bool = False
    reads_nothing: bool = False

    def alpha(self, problem: Problem, alpha: float) -> float:
        """Returns `alpha`, clipped to the largest exposure of this problem that fits the teacher's context."""
        return min(alpha, self.exposure_limit.get(problem.id, 1.0))

    def teacher_prompt(self, problem: Problem, alpha: float) -> list[int]:
        """Returns the ids of the teacher's prompt at `alpha`. Raises PromptTooLong."""
        return self.prompts.teacher(problem, self.shown.of(problem), alpha)

    def imitated(self, problems: list[Problem]) -> tuple[list[list[int]], list[list[int]], tuple[float, ...] | None]:
        """Returns the ids of the student's prompts and of the references as replies, and the weights (`weights_of`).
        Each problem comes once."""
        distinct = list({problem.id: problem for problem in problems}.values())
        replies = [self.prompts.reference_completion(self.references[problem.id])[0] for problem in distinct]
        return [self.prompts.student(problem) for problem in distinct], replies, weights_of(distinct)

    def exposed(self, problem: Problem, alpha: float) -> str:
        """Returns the part of a reference that the teacher reads at `alpha`; "" without one."""
        shown = self.shown.of(problem)
        return "" if shown is None else exposed_text(shown, alpha)

    def no_signal(self) -> bool:
        """Whether the teacher reads what the student reads. It starts equal to it, so their divergence starts at 0.
        False for another model, which differs from the student whatever it reads."""
        return (
            not self.other_teacher
            and self.reads_nothing
            and all(self.prompts.teacher(p, None, 0.0) == self.prompts.student(p) for p in self.problems.train[:ENOUGH])
        )

    def counts(self) -> dict[str, int]:
        """Returns counts for the summary at the end of the run."""
        return {
            "problems_used": len(self.problems.train),
            "problems_without_answer": self.problems.skipped,
            "problems_repeated": self.problems.repeated,
            "problems_too_long": self.too_long,
            "teacher_contexts_cut": len(self.exposure_limit),
        }


def load_splits(config: ATESDConfig) -> ProblemSplits:
    """Loads and splits the problems that `config` names; see `load_problems`."""
    return load_problems(
        config.dataset_name,
        num_train=config.num_train_problems,
        num_probe=config.num_probe_problems,
        num_eval=config.num_eval_problems,
        seed=config.seed,
        dataset_split=config.dataset_split,
        problem_column=config.problem_column,
        solution_column=config.solution_column,
        answer_column=config.answer_column,
        segments_column=config.segments_column,
        weight_column=config.weight_column,
        require_solution=reads_solutions(config),
        up_to=[name.removesuffix("_problems") for name in config.up_to],
    )


def reads_solutions(config: ATESDConfig) -> bool:
    """Whether anything in the run reads worked solutions: a teacher that is shown some, SFT, the probe or the score."""
    never_exposed = config.exposure_policy == "fixed" and config.fixed_alpha == 0
    shown = config.objective != "grpo" and config.reference_source != "none" and not never_exposed
    return shown or config.num_probe_problems > 0 or "sft" in config.objective


def settle_counts(config: ATESDConfig, problems: ProblemSplits) -> None:
    """Replaces counts that were upper bounds by what was found, so that a resumed run splits alike."""
    for name in config.up_to:
        if getattr(config, name) is not None:
            split = name.removeprefix("num_").removesuffix("_problems")
            setattr(config, name, len(getattr(problems, split)))


def check_weights(config: ATESDConfig, train: Sequence[Problem]) -> None:
    """Raises DataError if no training problem counts."""
    if train and all(problem.weight == 0 for problem in train):
        raise DataError(
            f"weight_column={config.weight_column!r} gives all {len(train)} training problems the weight 0, so nothing "
            "would be trained: give some of them a larger one"
        )


def load_run_data(
    config: ATESDConfig, tokenizer: Any, context_length: int, teacher_context_length: int | None = None
) -> RunData:
    """Loads, segments and checks the problems that `config` names.

    Args:
        context_length, teacher_context_length: of the student, and of another model that teaches, in tokens.

    Raises:
        ValueError: the problems cannot be read.
        PromptTooLong: a problem does not fit and `overlong_problems` is `refuse`, or no problem of a split fits.
    """
    problems = load_splits(config)
    settle_counts(config, problems)
    prompts = PromptBuilder(
        tokenizer,
        PromptTemplates.from_file(config.prompt_templates) if config.prompt_templates else None,
        student_chat_kwargs=json.loads(config.student_chat_template_kwargs),
        teacher_chat_kwargs=json.loads(config.teacher_chat_template_kwargs),
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        context_length=context_length,
        teacher_context_length=teacher_context_length,
    )
    checked = [*problems.train, *problems.probe]
    references = {p.id: split_reference(p.solution, p.answer) for p in checked}
    shown = ShownReferences(
        problems.train, source=config.reference_source, order=config.exposure_order, seed=config.seed
    )
    exposure_limit: dict[str, float] = {}
    too_long: dict[str, PromptTooLong] = {}
    everything = [*checked, *problems.eval]
    for problem in everything:
        try:
            if problem.id in references:
                prompts.check(problem, references[problem.id], shown.of(problem))
            elif config.eval_steps:
                prompts.check_answer_fits(problem, config.eval_completion_length)
            else:  # a study measures student and teacher on this problem
                prompts.check(problem, split_reference(problem.solution, problem.answer), shown.of(problem))
        except PromptTooLong as error:
            if config.overlong_problems == "refuse":
                raise
            too_long[problem.id] = error
    if config.overlong_problems == "cut":
        by_id = {p.id: p for p in checked}
        for name in [name for name in too_long if name in references]:
            with suppress(PromptTooLong):
                exposure_limit[name] = prompts.largest_alpha(by_id[name], references[name], shown.of(by_id[name]))
                del too_long[name]
    if exposure_limit:
        warnings.warn(
            f"the teacher's context is cut for {len(exposure_limit)} of {len(checked)} problems: it reads the leading "
            f"segments that fit into {prompts.teacher_context_length} tokens beside max_completion_length="
            f"{config.max_completion_length} ({', '.join(list(exposure_limit)[:3])}, ...)",
            stacklevel=2,
        )
    if too_long:
        warnings.warn(
            f"skipped {len(too_long)} of {len(everything)} problems that do not fit, the first because "
            f"{next(iter(too_long.values()))}",
            stacklevel=2,
        )
        splits = ("train", "probe", "eval")
        kept = {name: [p for p in getattr(problems, name) if p.id not in too_long] for name in splits}
        for name, left in kept.items():
            if getattr(problems, name) and not left:
                raise next(iter(too_long.values()))
        problems = replace(problems, **kept)
    check_weights(config, problems.train)
    reads_nothing = config.reference_source == "none" or {"none", STUDENT}.issuperset(views_of(config)[0])
    data = RunData(
        problems,
        references,
        prompts,
        shown,
        exposure_limit,
        len(too_long),
        other_teacher=config.other_model_teaches,
        reads_nothing=reads_nothing,
    )
    if data.no_signal():
        warnings.warn(
            "no signal: the teacher reads no reference, and its prompt is the student's. The teacher starts equal to "
            "the student, so the distillation loss starts at 0",
            stacklevel=2,
        )
    return data
