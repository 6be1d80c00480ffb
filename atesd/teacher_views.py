"""The views from which a teacher scores a response: what each has read, and its weight in the target.

The target's logits are the weighted sum of the views' (`teacher_mix` of `atesd_kernels.linear_divergence`). One view,
`exposed` at weight 1, is the method's own teacher.

| view          | reads                                                                |
|---------------|----------------------------------------------------------------------|
| `exposed`     | the reference up to alpha                                            |
| `full`        | all of it                                                            |
| `answer_only` | the final answer                                                     |
| `none`        | the student's message, under the teacher's chat template settings    |
| `student`     | what the student reads, with the student's own weights, not trained  |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.config.mixture import STUDENT, views_of
from atesd.data.problems import Problem
from atesd.data.run_data import RunData
from atesd.models.batching import PackedBatch, assert_same_responses
from atesd.models.teachers import AnyTeacher
from atesd.models.top_entries import TopEntries
from atesd.rollout import Rollout
from atesd.rollout.batches import pack_rollouts


class TeacherViews:
    """Computes the hidden states of a run's views.

    Args:
        config: reads `teacher_views`.
        teacher, data: of the run.
    """

    def __init__(self, config: ATESDConfig, teacher: AnyTeacher, data: RunData):
        self.teacher, self.data = teacher, data
        self.names, _ = views_of(config)

    def prepare(self, problems: Sequence[Problem], alphas: Sequence[float], rollouts: Sequence[Rollout]) -> None:
        """Tells a teacher behind a server of all responses of a step, so that it scores them concurrently."""
        if self.teacher.remote:
            prompts = [self.prompt(self.names[0], *pair) for pair in zip(problems, alphas, strict=True)]
            self.teacher.prepare(pack_rollouts(prompts, rollouts, torch.device("cpu")))

    def hidden(
        self, problems: Sequence[Problem], alphas: Sequence[float], rollouts: Sequence[Rollout], student: PackedBatch
    ) -> list[Tensor | TopEntries]:
        """Returns `(N, hidden)` for each view but `student`, one forward of the teacher for each; or top entries.

        Args:
            problems, alphas, rollouts: of a micro-batch.
            student: its batch, whose response tokens the views score.
        """
        found: list[Tensor | TopEntries] = []
        for name in self.names:
            if name == STUDENT:
                continue
            prompts = [self.prompt(name, problem, alpha) for problem, alpha in zip(problems, alphas, strict=True)]
            batch = pack_rollouts(prompts, rollouts, student.targets.device)
            assert_same_responses(student, batch)
            found.append(self.teacher.hidden(batch))
        return found

    def prompt(self, view: str, problem: Problem, alpha: float) -> list[int]:
        """Returns the ids of what a view reads before the response."""
        if view == "none":
            return self.data.prompts.teacher(problem, None, 0.0)
        shown = {"exposed": alpha, "full": self.data.alpha(problem, 1.0), "answer_only": 0.0}[view]
        return self.data.teacher_prompt(problem, shown)

    def target(
        self, hidden: list[Tensor | TopEntries], student_hidden: Tensor
    ) -> Tensor | TopEntries | list[Tensor | TopEntries]:
        """Returns what the loss takes as `teacher_hidden`: that of one view, else a list.

        Args:
            hidden: what `hidden` has returned.
            student_hidden: `(N, hidden)`, for the view `student`.
        """
        views = [*hidden, student_hidden.detach()] if STUDENT in self.names else hidden
        return views if len(views) > 1 else views[0]
