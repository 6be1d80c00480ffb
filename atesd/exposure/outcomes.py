"""Measures a step's probe NLL and teacher-grounded score, which the exposure policy reads in addition to the loss.

Both are measured on reference solutions, without gradient, before the step's update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from atesd.data.context import num_exposed
from atesd.data.problems import Problem
from atesd.data.prompts import PromptBuilder
from atesd.data.segmentation import Reference
from atesd.models.batching import chunks, pack
from atesd.models.teachers import Teacher
from atesd.objectives import token_logprobs
from atesd.parallel.processes import Processes
from atesd_kernels.integrations.head import hidden_states_and_head
from atesd_kernels.integrations.wrappers import eval_mode

GROUNDING_PROBLEMS = 2  # problems per step for the grounded score (our choice: 2 % of a step's time)


def first_scored(ends: Sequence[int], alpha: float, grounding: str) -> int:
    """The first reference token that the grounded score counts; the teacher could copy those before it.

    Args:
        ends: where each segment of the tokenised reference ends.
        grounding: "reference" scores all tokens outside the exposed prefix, "answer" those after the last segment.
    """
    exposed = num_exposed(alpha, len(ends)) if grounding == "reference" else len(ends)
    return ends[exposed - 1] if exposed else 0


class OutcomeMeter:
    """Measures the model's current weights.

    Args:
        model, teacher: the student and its teacher.
        prompts, references: the prompt builder, and the reference solutions by problem id.
        probe: held-out problems; an empty list switches the probe NLL off.
        probe_every: steps between probe measurements.
        grounding: "reference" scores all reference tokens outside the teacher's context, "answer" the final answer
            only, "none" nothing.
        batch_size: problems per forward pass.
        chunk_bytes: as in `atesd_kernels.linear_logprobs`.
        processes: the processes of the run; the problems are divided among them.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        prompts: PromptBuilder,
        references: Mapping[str, Reference],
        probe: list[Problem],
        *,
        probe_every: int,
        grounding: str,
        batch_size: int,
        chunk_bytes: int | None,
        processes: Processes,
    ):
        self.model, self.teacher, self.prompts, self.references = model, teacher, prompts, references
        self.backbone, self.head = hidden_states_and_head(model)
        self.device = self.head.weight.device
        self.probe, self.probe_every, self.grounding, self.batch_size = probe, probe_every, grounding, batch_size
        self.chunk_bytes, self.processes = chunk_bytes, processes

    @torch.no_grad()
    def measure(self, step: int, alphas: Sequence[float], problems: list[Problem]) -> dict[str, float | None]:
        """Returns `{"probe_nll": ..., "grounded": ...}` of step `step`; None for a value that is not due.

        Args:
            alphas, problems: of the step, over all processes: each problem once, with its exposure.
        """
        due = bool(self.probe) and step % self.probe_every == 0
        with eval_mode(self.model):
            return {
                "probe_nll": self.probe_nll() if due else None,
                "grounded": None if self.grounding == "none" else self.grounded(alphas, problems[:GROUNDING_PROBLEMS]),
            }

    def probe_nll(self) -> float:
        """Returns the mean over tokens of `-log p_S(y*|x)`: how well the student predicts the held-out references."""
        mine, counted = self.processes.padded_round_robin(self.probe)
        logprobs = self.reference_logprobs(mine)[:counted]
        total, tokens = self.processes.all_reduce_sum(
            sum(float(part.sum()) for part in logprobs), sum(len(part) for part in logprobs)
        )
        return -total / tokens

    @torch.no_grad()
    def reference_nll(self, problems: Sequence[Problem]) -> list[float]:
        """Returns, for each problem, the mean over tokens of `-log p_S(y*|x)`: its difficulty for the student."""
        with eval_mode(self.model):
            return [-float(logprobs.mean()) for logprobs in self.reference_logprobs(problems)]

    def reference_logprobs(self, problems: Sequence[Problem]) -> list[torch.Tensor]:
        """Returns, for each problem, `log p_S` of its reference's tokens, `(tokens,)` float64."""
        parts: list[torch.Tensor] = []
        for part in chunks(len(problems), self.batch_size):
            replies = [self.prompts.reference_completion(self.references[p.id])[0] for p in problems[part]]
            batch = pack([self.prompts.student(p) for p in problems[part]], replies, self.device)
            logprobs = token_logprobs(self.backbone, self.head, batch, self.chunk_bytes)
            parts += logprobs.double().split(batch.lengths)
        return parts

    def grounded(self, alphas: Sequence[float], problems: list[Problem]) -> float:
        """Returns the mean over problems of the mean `log p_T^alpha` of reference tokens outside the teacher's context.

        The teacher could copy the exposed tokens, so they are context here and not scored. The answer is in its context
        at every alpha but is always scored: otherwise nothing would be scored at alpha = 1.
        """
        contexts, scored = [], []
        mine, counted = self.processes.padded_round_robin(list(zip(problems, alphas, strict=False)))
        for problem, alpha in mine:
            reference = self.references[problem.id]
            ids, ends = self.prompts.reference_completion(reference, after_teacher_prompt=True)
            cut = first_scored(ends, alpha, self.grounding)
            contexts.append(self.prompts.teacher(problem, reference, alpha) + ids[:cut])
            scored.append(ids[cut:])
        batch = pack(contexts, scored, self.device)
        logprobs = token_logprobs(self.teacher.backbone_call, self.teacher.head, batch, self.chunk_bytes)
        scores = [float(part.double().mean()) for part in logprobs.split(batch.lengths)]
        return self.processes.all_reduce_sum(sum(scores[:counted]))[0] / len(problems)
