"""Measures student and teacher on fixed held-out problems: mismatch on new rollouts, reference NLL, correct answers.

Studies use it to compare runs before and after training. Training batches differ between runs; these problems and
their seeds do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from atesd.data.problems import Problem
from atesd.data.segmentation import split_reference
from atesd.data.thinking import decode_response
from atesd.models.batching import chunks, hidden_rows
from atesd.objectives import ResponseTokens, make_distillation, percentile
from atesd.rollout import Rollout, Sampling
from atesd.rollout.batches import pack_rollouts
from atesd.run import Run
from atesd.terminal import progress
from atesd_kernels.integrations.wrappers import eval_mode


@dataclass(frozen=True)
class Measured:
    """Measurements on one problem.

    Attributes:
        id: the problem's id.
        reference_nll: the student's mean NLL per reference token in nats, given the student's prompt.
        mismatch, mismatch_p95: mean and 95th percentile of KL(teacher || student) over one rollout's tokens, in nats.
        top1_disagreement: share of the rollout's tokens at which the models' most likely tokens differ.
        num_tokens: length of the rollout.
        correct: whether the rollout's final answer is correct; None if that was not asked for, or without math-verify.
    """

    id: str
    reference_nll: float
    mismatch: float
    mismatch_p95: float
    top1_disagreement: float
    num_tokens: int
    correct: bool | None


@torch.no_grad()
def measure(run: Run, problems: Sequence[Problem], alpha: float, graded: bool = True) -> list[Measured]:
    """Measures the current student, and its teacher at exposure `alpha`. Returns one `Measured` per problem.

    Rollouts use the run's sampling settings and fixed seeds, the same at every call. They do not use the run's random
    state. The divergence is always unclipped forward KL at the scoring temperature, whatever the training objective.
    """
    config = run.config
    references = run.data.references
    references.update({p.id: split_reference(p.solution, p.answer) for p in problems if p.id not in references})
    prompts = [run.data.prompts.student(p) for p in problems]
    distillation = make_distillation(
        config, scoring_temperature=config.scoring_temperature, chunk_bytes=config.chunk_bytes
    )
    kl, agree, rollouts = [], [], []
    run.rollout.engine.sync()
    with eval_mode(run.student.model), run.student.autocast(), progress("held-out problems", len(problems)):
        # decode as many at once as a training step, and score as many as a micro-batch
        for part in chunks(len(problems), config.per_device_train_batch_size * config.gradient_accumulation_steps):
            seeds = tuple(range(part.start, part.stop))
            sampling = Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k, seeds)
            rollouts += run.rollout.engine.generate(prompts[part], sampling)
        for part in chunks(len(problems), config.per_device_train_batch_size):
            student = pack_rollouts(prompts[part], rollouts[part], run.device)
            alphas = [run.data.alpha(problem, alpha) for problem in problems[part]]
            views = run.views.hidden(problems[part], alphas, rollouts[part], student)
            student_hidden = hidden_rows(run.student.backbone, student)
            _, stats = distillation(
                student_hidden,
                run.student.head,
                run.views.target(views, student_hidden),
                None if run.teacher.shares_head else run.teacher.head,
                ResponseTokens(student.targets, student.lengths),
                len(student.targets),
            )
            kl += stats.divergence.double().split(student.lengths)
            agree += stats.top1_agree.double().split(student.lengths)
        nll = run.exposure.meter.reference_nll(problems)
    run.rollout.engine.release()
    correct = grade(run, problems, rollouts) if graded else [None] * len(problems)
    return [
        Measured(
            id=p.id,
            reference_nll=nll[i],
            mismatch=float(kl[i].mean()),
            mismatch_p95=percentile(kl[i], 0.95),
            top1_disagreement=1 - float(agree[i].mean()),
            num_tokens=len(kl[i]),
            correct=correct[i],
        )
        for i, p in enumerate(problems)
    ]


def grade(run: Run, problems: Sequence[Problem], rollouts: list[Rollout]) -> list[bool | None]:
    if find_spec("math_verify") is None:
        return [None] * len(problems)
    from atesd.evaluation.grading.grader import Grader

    texts = [decode_response(run.tokenizer, r.prompt_ids, r.response_ids) for r in rollouts]
    golds, cut_off = [p.answer for p in problems], [r.cut_off for r in rollouts]
    with Grader(box_only=run.config.box_only) as grader:
        return [verdict.correct for verdict in grader.grade_many(texts, golds, cut_off)]
