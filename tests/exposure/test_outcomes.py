"""The probe NLL and the grounded score, against dense computations of one problem."""

from __future__ import annotations

import pytest
import torch

from atesd.run import Run
from atesd.trainer import Trainer
from atesd_kernels.integrations.head import unwrap


@pytest.fixture
def trainer(tiny_config):
    return Trainer(Run.build(tiny_config(grounding="reference")))


def dense_logprobs(trainer, context, reply):
    with torch.no_grad():
        logits = unwrap(trainer.run.student.model)(torch.tensor([context + reply])).logits[0]
    return logits.log_softmax(-1)[range(len(context) - 1, len(context + reply) - 1), reply]


def test_the_probe_nll_is_the_mean_over_tokens_of_the_references_under_the_student(trainer):
    logprobs = [
        dense_logprobs(
            trainer,
            trainer.run.data.prompts.student(p),
            trainer.run.data.prompts.reference_completion(trainer.run.data.references[p.id])[0],
        )
        for p in trainer.run.data.problems.probe
    ]
    expected = -torch.cat(logprobs).mean().item()
    assert trainer.run.exposure.meter.probe_nll() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("grounding", "alpha", "shown"), [
    ("reference", 0.0, 0), ("reference", 0.34, 1), ("reference", 0.67, 2), ("reference", 1.0, 3),
    ("answer", 0.0, 3), ("answer", 1.0, 3),
])  # fmt: skip
def test_the_grounded_score_leaves_out_the_tokens_the_teacher_was_shown(trainer, grounding, alpha, shown):
    trainer.run.exposure.meter.grounding = grounding
    problem = trainer.run.data.problems.train[0]
    reference = trainer.run.data.references[problem.id]
    reply, ends = trainer.run.data.prompts.reference_completion(reference)
    assert len(ends) == 3
    logprobs = dense_logprobs(trainer, trainer.run.data.prompts.teacher(problem, reference, alpha), reply)
    expected = logprobs[ends[shown - 1] if shown else 0 :].mean().item()
    assert trainer.run.exposure.meter.grounded([alpha], [problem]) == pytest.approx(expected, rel=1e-5)
    if shown:
        assert expected != pytest.approx(logprobs.mean().item(), rel=1e-5)


def test_nothing_is_measured_that_is_not_asked_for(tiny_config):
    trainer = Trainer(Run.build(tiny_config(grounding="none", num_probe_problems=0, progress_signal="distill_loss")))
    assert trainer.run.exposure.meter.measure(0, [0.5], trainer.run.data.problems.train) == {
        "probe_nll": None,
        "grounded": None,
    }


@pytest.mark.parametrize(
    ("settings", "alpha", "copied"),
    [
        ({"exposure_order": "trailing"}, 0.34, {2}),
        ({"exposure_order": "trailing"}, 0.67, {1, 2}),
        ({"exposure_order": "random"}, 0.67, None),
        ({"reference_source": "other_problem"}, 0.67, set()),
        ({"reference_source": "wrong_answer"}, 1.0, set()),
        ({"reference_source": "none", "exposure_policy": "full"}, 1.0, set()),
    ],
)
def test_the_grounded_score_is_of_the_own_solution_less_what_of_it_can_be_copied(tiny_config, settings, alpha, copied):
    trainer = Trainer(Run.build(tiny_config(grounding="reference", **settings)))
    data, problem = trainer.run.data, trainer.run.data.problems.train[0]
    reply, ends = data.prompts.reference_completion(data.references[problem.id])
    copied = set(data.shown.of(problem).order[:2]) if copied is None else copied
    counted = [t for t in range(len(reply)) if not any(t in range(([0] + ends)[s], ends[s]) for s in copied)]
    logprobs = dense_logprobs(trainer, data.teacher_prompt(problem, alpha), reply)
    expected = logprobs[counted].mean().item()
    assert trainer.run.exposure.meter.grounded([alpha], [problem]) == pytest.approx(expected, rel=1e-5)
    trainer.run.close()
