"""The problems of a run with their references and prompts, and which of them cannot be used.

Separate from the run's state so that `--dry-run` and the sweep read exactly what a run would read, without a model.
Everything here is checked before anything long is loaded.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from atesd.config import ATESDConfig
from atesd.data.problems import Problem, ProblemSplits, load_problems
from atesd.data.prompts import PromptBuilder, PromptTemplates, PromptTooLong
from atesd.data.segmentation import Reference, split_reference


@dataclass(frozen=True)
class RunData:
    """What a run trains and probes on.

    Attributes:
        problems: the splits; all of their problems fit.
        references: by problem id, the reference solution cut into segments.
        prompts: builds the token ids.
        exposure_limit: by problem id, the largest alpha whose teacher prompt fits, where that is not 1
            (`overlong_problems: cut`).
        too_long: how many problems were left out because they do not fit (`overlong_problems: skip` or `cut`).
    """

    problems: ProblemSplits
    references: dict[str, Reference]
    prompts: PromptBuilder
    exposure_limit: dict[str, float]
    too_long: int

    def alpha(self, problem: Problem, alpha: float) -> float:
        """`alpha`, or the most of this problem's reference that fits into the teacher's context."""
        return min(alpha, self.exposure_limit.get(problem.id, 1.0))

    def counts(self) -> dict[str, int]:
        """For the summary at the end of the run."""
        return {
            "problems_used": len(self.problems.train),
            "problems_without_answer": self.problems.skipped,
            "problems_repeated": self.problems.repeated,
            "problems_too_long": self.too_long,
            "teacher_contexts_cut": len(self.exposure_limit),
        }


def load_splits(config: ATESDConfig) -> ProblemSplits:
    """The problems `config` names, as `load_problems` splits them."""
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
    )


def load_run_data(config: ATESDConfig, tokenizer: Any, context_length: int) -> RunData:
    """Load, segment and check the problems `config` names.

    Raises:
        ValueError: problems that cannot be read; PromptTooLong, a ValueError, for one that does not fit, unless
            `overlong_problems` says otherwise.
    """
    problems = load_splits(config)
    prompts = PromptBuilder(
        tokenizer,
        PromptTemplates.from_file(config.prompt_templates) if config.prompt_templates else None,
        student_chat_kwargs=json.loads(config.student_chat_template_kwargs),
        teacher_chat_kwargs=json.loads(config.teacher_chat_template_kwargs),
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        context_length=context_length,
    )
    checked = [*problems.train, *problems.probe]
    references = {p.id: split_reference(p.solution, p.answer) for p in checked}
    exposure_limit: dict[str, float] = {}
    too_long: dict[str, PromptTooLong] = {}
    everything = [*checked, *problems.eval]
    for problem in everything:
        try:
            if problem.id in references:
                prompts.check(problem, references[problem.id])
            elif config.eval_steps:
                prompts.check_answer_fits(problem, config.eval_completion_length)
            else:  # a study measures student and teacher on it
                prompts.check(problem, split_reference(problem.solution, problem.answer))
        except PromptTooLong as error:
            if config.overlong_problems == "refuse":
                raise
            too_long[problem.id] = error
    if config.overlong_problems == "cut":
        by_id = {p.id: p for p in checked}
        for name in [name for name in too_long if name in references]:
            with suppress(PromptTooLong):
                exposure_limit[name] = prompts.largest_alpha(by_id[name], references[name])
                del too_long[name]
    if exposure_limit:
        warnings.warn(
            f"the teacher's context is cut for {len(exposure_limit)} of {len(checked)} problems: it reads the leading "
            f"segments that fit into {context_length} tokens beside max_completion_length="
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
    return RunData(problems, references, prompts, exposure_limit, len(too_long))
