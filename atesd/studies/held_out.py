"""Student and teacher on fixed held-out problems: mismatch on fresh rollouts, the reference's NLL, and right answers.

Separate from the trainer because studies compare runs with it, before and after training: the training batches of two
runs differ, these problems and their seeds do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from atesd.data.problems import Problem
from atesd.data.segmentation import split_reference
from atesd.models.batching import chunks, hidden_rows, pack
from atesd.models.teachers import eval_mode
from atesd.objectives import Distillation, ResponseTokens, percentile
from atesd.rollout import Sampling
from atesd.run import Run


@dataclass(frozen=True)
class Measured:
    """One problem.

    Attributes:
        id: of the problem.
        reference_nll: mean over the reference's tokens of the student's -log p, problem alone in the prompt, in nats.
        mismatch, mismatch_p95: mean and 95th percentile over one rollout's tokens of KL(teacher || student), in nats.
        top1_disagreement: share of the rollout's tokens at which both models' most likely token differs.
        num_tokens: of the rollout.
        correct: whether the rollout's final answer is right; None without math-verify.
    """

    id: str
    reference_nll: float
    mismatch: float
    mismatch_p95: float
    top1_disagreement: float
    num_tokens: int
    correct: bool | None


@torch.no_grad()
def measure(run: Run, problems: Sequence[Problem], alpha: float) -> list[Measured]:
    """Measure `problems` with the student as it stands and its teacher at exposure `alpha`.

    Rollouts are sampled as the run samples, with seeds of their own: the same at every call, and nothing of the run's
    random state is used. The divergence is forward KL without clips at the scoring temperature, whatever is trained.
    """
    config = run.config
    references = run.data.references
    references.update({p.id: split_reference(p.solution, p.answer) for p in problems if p.id not in references})
    prompts = [run.data.prompts.student(p) for p in problems]
    distillation = Distillation(scoring_temperature=config.scoring_temperature, chunk_bytes=config.chunk_bytes)
    kl, agree, responses = [], [], []
    run.rollout.engine.sync()
    with eval_mode(run.student.model), run.student.autocast():
        # as many at once as a step decodes, and as a micro-batch scores
        for part in chunks(len(problems), config.per_device_train_batch_size * config.gradient_accumulation_steps):
            seeds = tuple(range(part.start, part.stop))
            sampling = Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k, seeds)
            responses += [r.response_ids for r in run.rollout.engine.generate(prompts[part], sampling)]
        for part in chunks(len(problems), config.per_device_train_batch_size):
            replies = responses[part]
            exposed = [run.data.prompts.teacher(p, references[p.id], run.data.alpha(p, alpha)) for p in problems[part]]
            student, teacher = (pack(read, replies, run.device) for read in (prompts[part], exposed))
            _, stats = distillation(
                hidden_rows(run.student.backbone, student),
                run.student.head,
                run.teacher.hidden(teacher),
                None if run.teacher.shares_head else run.teacher.head,
                ResponseTokens(student.targets, student.lengths),
                len(student.targets),
            )
            kl += stats.divergence.double().split(student.lengths)
            agree += stats.top1_agree.double().split(student.lengths)
        nll = run.exposure.meter.reference_nll(problems)
    run.rollout.engine.release()
    correct = grade(run, problems, responses)
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


def grade(run: Run, problems: Sequence[Problem], responses: list[list[int]]) -> list[bool | None]:
    if find_spec("math_verify") is None:
        return [None] * len(problems)
    from atesd.evaluation.grading.grader import Grader

    texts = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    with Grader() as grader:
        return [verdict.correct for verdict in grader.grade_many(texts, [p.answer for p in problems])]
