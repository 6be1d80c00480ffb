"""The difference between an engine's log-probabilities and the trainer's, and the weight that makes up for it."""

from __future__ import annotations

import math

import pytest
import torch

from atesd.objectives import Distillation, ResponseTokens
from atesd.rollout import Rollout
from atesd.rollout.mismatch import EngineMismatch
from atesd.run import Run
from atesd.trainer import Trainer
from atesd_kernels.integrations.head import HeadSpec

TARGETS = torch.tensor([3, 1, 4, 1, 5])
SHIFTS = torch.tensor([0.0, math.log(2), -math.log(2), math.log(8), -math.log(4)])


@pytest.fixture
def states():
    torch.manual_seed(0)
    return torch.randn(5, 8), torch.randn(5, 8), HeadSpec(torch.randn(11, 8))


def engine_says(hidden, head, shifts=SHIFTS) -> list[Rollout]:
    """Two responses whose engine gave each token `exp(shift)` times less than the trainer does."""
    right = (hidden @ head.weight.T).log_softmax(-1).gather(1, TARGETS[:, None]).flatten()
    logprobs = (right - shifts).tolist()
    tokens = TARGETS.tolist()
    return [
        Rollout([9], tokens[:2], False, logprobs=logprobs[:2]),
        Rollout([9], tokens[2:], True, logprobs=logprobs[2:]),
    ]


def test_the_mean_absolute_difference_is_logged_and_no_token_is_weighed_unless_asked(states):
    hidden, _, head = states
    mismatch = EngineMismatch(clip=None)
    assert mismatch.measure(engine_says(hidden, head), hidden, head, TARGETS) is None
    assert mismatch.take() == {"engine_logprob_diff": pytest.approx(SHIFTS.abs().mean().item(), rel=1e-4)}
    assert mismatch.take() == {}, "a step's tokens are its own"


def test_weights_are_probability_ratios_clipped_from_above(states):
    hidden, _, head = states
    mismatch = EngineMismatch(clip=3.0)
    weights = mismatch.measure(engine_says(hidden, head), hidden, head, TARGETS)
    torch.testing.assert_close(weights, torch.tensor([1, 2, 0.5, 3, 0.25]), rtol=1e-4, atol=0)
    metrics = mismatch.take()
    assert metrics["importance_weight"] == pytest.approx(6.75 / 5, rel=1e-4)
    assert metrics["importance_clipped"] == pytest.approx(0.2)


def test_an_engine_without_log_probs_is_the_trainer_itself_and_measures_nothing(states):
    hidden, _, head = states
    mismatch = EngineMismatch(clip=3.0)
    assert mismatch.measure([Rollout([9], TARGETS.tolist(), False)], hidden, head, TARGETS) is None
    assert mismatch.take() == {}


def test_the_loss_is_the_mean_of_the_weighed_tokens(states):
    student, teacher, head = states
    weights = torch.tensor([1, 2, 0.5, 3, 0.25])
    loss, stats = Distillation()(student, head, teacher, None, ResponseTokens(TARGETS, (2, 3), weight=weights), 5)
    assert loss.item() == pytest.approx((weights * stats.divergence).mean().item(), rel=1e-5)


def test_a_step_weighs_its_gradient_by_the_ratio_to_what_the_engine_says(tiny_config, tmp_path):
    def gradient(clip, factor):
        trainer = Trainer(Run.build(tiny_config(rollout_engine="hf", output_dir=str(tmp_path / f"{clip}-{factor}"))))
        trainer.run.engine_mismatch = EngineMismatch(clip)
        problems = trainer.run.data.problems.train[:4]
        rollouts = [
            Rollout(trainer.run.data.prompts.student(p), [20 + i, 21, 22], False, logprobs=[-1000.0 * factor] * 3)
            for i, p in enumerate(problems)
        ]
        trainer.distill(problems, rollouts, [1.0] * 4)
        return torch.cat([p.grad.flatten() for p in trainer.run.student.trained.values()])

    plain, unweighed, doubled = gradient(None, 1), gradient(1.0, 1), gradient(2.0, 1)
    assert torch.equal(plain, unweighed) and plain.norm() > 0
    torch.testing.assert_close(doubled, 2 * plain)
