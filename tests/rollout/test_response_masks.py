"""Responses in which a tool speaks too: its tokens are read, and count in no loss and no statistic."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import hidden_rows, pack
from atesd.rollout import Rollout, RolloutError
from atesd.rollout.hf import HFEngine
from atesd.rollout.mismatch import EngineMismatch
from atesd.run import Run
from atesd.step_metrics import response_metrics
from atesd.trainer import Trainer, train
from atesd_kernels.integrations.head import HeadSpec
from tests.run_logs import rows_of

PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10]], [[20, 21], [22, 23, 24, 25], [26]]
MASKS = [None, [1, 0, 0, 1], [0]]


def masked(monkeypatch, mask_of):
    """Lets the engine mask its responses as `mask_of(response)` says."""
    generate = HFEngine.generate

    def with_masks(engine, prompts, sampling=None):
        rollouts = generate(engine, prompts, sampling)
        return [replace(r, response_mask=mask_of(r.response_ids)) for r in rollouts]

    monkeypatch.setattr(HFEngine, "generate", with_masks)


def every_other(response):
    return [i % 2 for i in range(len(response))]


def test_rows_of_counted_tokens_are_those_of_the_whole_response(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float64)
    use_packed_attention(model)
    part, whole = pack(PROMPTS, RESPONSES, "cpu", MASKS), pack(PROMPTS, RESPONSES, "cpu")
    assert part.targets.tolist() == [20, 21, 22, 25] and part.lengths == (2, 2, 0)
    assert part.input_ids.equal(whole.input_ids) and part.ends.equal(whole.ends)
    assert hidden_rows(model.model, part).equal(hidden_rows(model.model, whole)[[0, 1, 2, 5]])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_step_counts_the_students_tokens_only(tiny_config, monkeypatch, aggregation):
    masked(monkeypatch, every_other)
    trainer = Trainer(Run.build(tiny_config(loss_aggregation=aggregation, exposure_policy="full")))
    problems, rollouts = trainer.roll_out(0)
    loss, totals, num_tokens = trainer.distill(problems, rollouts, [1.0] * len(problems))
    assert num_tokens == sum(len(r.response_ids) // 2 for r in rollouts)
    assert totals.sums[0].shape == (5,) and sum(map(len, totals.divergences)) == num_tokens
    # the same tokens' losses, each response alone
    one = [trainer.distill([p], [r], [1.0]) for p, r in zip(problems, rollouts, strict=True)]
    weights = [n if aggregation == "token" else 1 for _, _, n in one]
    expected = sum(w * value for w, (value, _, _) in zip(weights, one, strict=True)) / sum(weights)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_step_in_which_no_token_counts_changes_nothing_and_the_run_goes_on(tiny_config, monkeypatch):
    calls = []

    def none_in_the_second_step(response):
        calls.append(response)
        return [0] * len(response) if 4 < len(calls) <= 8 else None  # four responses a step

    masked(monkeypatch, none_in_the_second_step)
    rows = rows_of(train(tiny_config(max_steps=3)))
    assert [row["loss"] == 0 for row in rows] == [False, True, False]
    assert [row["skipped"] for row in rows] == [0, 0, 0] and rows[1]["grad_norm"] == 0
    assert rows[1]["response_length"] == 0 and rows[2]["mismatch"] > 0


def test_masked_responses_generated_ahead_survive_a_resume():
    rollout = Rollout([1], [2, 3], truncated=False, response_mask=[1, 0])
    assert Rollout(**json.loads(json.dumps(rollout.__dict__))) == rollout


def test_metrics_and_engine_log_probs_are_of_counted_tokens():
    loop = Rollout([1], [7, 8] * 20 + [1, 2, 3, 4], truncated=False, response_mask=[0] * 40 + [1] * 4)
    assert response_metrics([loop]) == {
        "response_length": 4, "truncated_fraction": 0, "repetition": 0, "staleness": 0
    }  # fmt: skip
    mismatch = EngineMismatch(clip=2.0)
    hidden, weight = torch.zeros(1, 3), torch.zeros(5, 3)
    rollout = Rollout([1], [2, 3], truncated=False, logprobs=[-9.0, -math.log(5)], response_mask=[0, 1])
    factor = mismatch.measure([rollout], hidden, HeadSpec(weight), torch.tensor([3]))
    assert factor.tolist() == pytest.approx([1.0])
    assert mismatch.take()["engine_logprob_diff"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("mask", [[1], [1, 2, 1], "ab"])
def test_a_mask_that_does_not_fit_is_refused_and_the_run_is_saved(tiny_config, monkeypatch, mask):
    masked(monkeypatch, lambda response: mask)
    with pytest.raises(RolloutError, match=r"response_mask of \d entries.*(?s:.*)go on with atesd train --resume"):
        train(tiny_config(max_steps=1))
