"""Measures a step's probe NLL and teacher-grounded score, which the exposure policy reads in addition to the loss.

Both are measured on reference solutions, without gradient, before the step's update.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from atesd.data.problems import Problem
from atesd.data.run_data import RunData
from atesd.models.batching import chunks, pack
from atesd.models.scoring import token_logprobs
from atesd.models.teachers import AnyTeacher
from atesd.parallel.processes import Processes
from atesd_kernels.integrations.head import hidden_states_and_head
from atesd_kernels.integrations.wrappers import eval_mode

GROUNDING_PROBLEMS = 2  # problems per step for the grounded score (our choice: 2 % of a step's time)


def scored_tokens(ends: Sequence[int], copied: Collection[int], num_tokens: int) -> torch.Tensor:
    """Returns which tokens of a reference the grounded score counts, bool `(num_tokens,)`: those outside of `copied`.

    Args:
        ends: where each segment of the tokenised reference ends.
        copied: the numbers of the segments that the teacher could copy.
    """
    counted = torch.ones(num_tokens, dtype=torch.bool)
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        if number in copied:
            counted[start:end] = False
    return counted


class OutcomeMeter:
    """Measures the model's current weights.

    Args:
        model, teacher: the student and its teacher.
        data: prompts, the problems' own references, and what the teacher is shown.
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
        teacher: AnyTeacher,
        data: RunData,
        probe: list[Problem],
        *,
        probe_every: int,
        grounding: str,
        batch_size: int,
        chunk_bytes: int | None,
        processes: Processes,
    ):
        self.model, self.teacher, self.data = model, teacher, data
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
            prompts = self.data.prompts
            replies = [prompts.reference_completion(self.data.references[p.id])[0] for p in problems[part]]
            batch = pack([prompts.student(p) for p in problems[part]], replies, self.device)
            logprobs = token_logprobs(self.backbone, self.head, batch, self.chunk_bytes)
            parts += logprobs.double().split(batch.lengths)
        return parts

    def grounded(self, alphas: Sequence[float], problems: list[Problem]) -> float:
        """Returns the mean over problems of the mean `log p_T^alpha` of those reference tokens it could not copy.

        The exposed segments of the problem's own solution are context and not scored. The answer is in the teacher's
        context at every alpha but is always scored: otherwise nothing would be scored at alpha = 1.
        """
        contexts, scored, masks = [], [], []
        mine, counted = self.processes.padded_round_robin(list(zip(problems, alphas, strict=False)))
        for problem, alpha in mine:
            own = self.data.references[problem.id]
            ids, ends = self.data.prompts.reference_completion(own, after_teacher_prompt=True)
            by_answer = self.grounding == "answer"
            copied = set(range(len(ends))) if by_answer else self.data.shown.copied(problem, own, alpha)
            kept = scored_tokens(ends, copied, len(ids))
            cut = int(kept.int().argmax())  # those before it are context only
            contexts.append(self.data.teacher_prompt(problem, alpha) + ids[:cut])
            scored.append(ids[cut:])
            masks.append(kept[cut:])
        batch = pack(contexts, scored, self.device)
        logprobs = self.teacher.target_logprobs(batch, self.chunk_bytes)
        parts = zip(logprobs.double().cpu().split(batch.lengths), masks, strict=True)
        scores = [float(part[mask].mean()) for part, mask in parts]
        return self.processes.all_reduce_sum(sum(scores[:counted]))[0] / len(problems)
