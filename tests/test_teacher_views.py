"""Several views of one teacher in a run."""

from __future__ import annotations

import json

import pytest
import torch

from atesd.config import load_config
from atesd.errors import ConfigError
from atesd.models.batching import hidden_rows
from atesd.rollout.batches import pack_rollouts
from atesd.run import Run
from atesd.trainer import Trainer, train

CONTRAST = {"exposed": 1.3, "answer_only": -0.3}


def views(**weights) -> str:
    return json.dumps(weights)


def of_step(config, problems=None, rollouts=None):
    """The loss, statistics and gradient of a step's batch at alpha 0.5, and the batch."""
    trainer = Trainer(Run.build(config))
    drawn = trainer.roll_out(0)
    problems, rollouts = problems or drawn[0], rollouts or drawn[1]
    loss, totals, num_tokens = trainer.distill(problems, rollouts, [0.5] * len(problems))
    gradient = torch.cat([p.grad.flatten() for p in trainer.run.student.trained.values()])
    trainer.run.close()
    return loss, totals.means(num_tokens), gradient, (trainer.run, problems, rollouts)


def logits_of(run, prompts, rollouts, hidden):
    batch = pack_rollouts(prompts, rollouts, run.device)
    with torch.no_grad():
        return run.student.head.logits(hidden(batch)).double() / run.config.scoring_temperature


@pytest.mark.parametrize(
    "weights",
    [
        CONTRAST,
        {"full": 2, "none": -1},
        {"exposed": 0.5, "student": 0.5},
        {"none": 1, "full": 0.5, "answer_only": -0.5},
    ],
    ids=" ".join,
)
def test_the_target_is_the_weighted_sum_of_the_views_logits(tiny_config, weights):
    full = {} if "exposed" in weights else {"exposure_policy": "full"}
    config = tiny_config(teacher_views=views(**weights), teacher="ema", entry_clip=None, **full)
    loss, means, _, (run, problems, rollouts) = of_step(config)
    shown = {"exposed": 0.5, "full": 1.0, "answer_only": 0.0}
    target = 0.0
    for name, weight in weights.items():
        if name == "student":
            prompts, hidden = [r.prompt_ids for r in rollouts], lambda b: hidden_rows(run.student.backbone, b)
        else:
            hidden = run.teacher.hidden
            prompts = [
                run.data.prompts.teacher(p, None, 0.0) if name == "none" else run.data.teacher_prompt(p, shown[name])
                for p in problems
            ]
        target = target + weight * logits_of(run, prompts, rollouts, hidden)
    s = logits_of(run, [r.prompt_ids for r in rollouts], rollouts, lambda b: hidden_rows(run.student.backbone, b))
    log_p, log_q = target.log_softmax(-1), s.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert expected > 1e-6
    assert loss == pytest.approx(expected, rel=1e-3) and means["mismatch"] == pytest.approx(expected, rel=1e-3)


def test_one_view_at_weight_one_is_the_plain_teacher_to_the_last_bit(tiny_config, tmp_path):
    plain = of_step(tiny_config(output_dir=str(tmp_path / "a")))
    named = of_step(tiny_config(teacher_views=views(exposed=1.0), output_dir=str(tmp_path / "b")))
    assert plain[0] == named[0] and plain[2].equal(named[2])


def test_a_run_with_views_goes_on_to_the_last_bit(tiny_config, tmp_path):
    settings = {"teacher_views": views(**CONTRAST), "save_steps": 1}
    whole = train(tiny_config(max_steps=3, output_dir=str(tmp_path / "whole"), **settings))
    part = train(tiny_config(max_steps=2, output_dir=str(tmp_path / "part"), **settings))
    train(load_config(None, ["--resume", str(part), "--max_steps", "3"]))
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (whole, part)]
    assert losses[0] == losses[1] and min(losses[0]) > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--teacher_views", '{"exposd": 1}'], "teacher_views has 'exposd' (did you mean exposed?)"),
        (["--teacher_views", '{"exposed": 1.3}'], "let them sum to 1"),
        (["--teacher_views", "{}"], "let them sum to 1"),
        (["--teacher_views", '{"exposed": "1"}'], "let them sum to 1"),
        (["--teacher_views", '{"exposed": true}'], "let them sum to 1"),
        (["--teacher_views", '{"exposed": NaN, "full": 1}'], "let them sum to 1"),
        (["--teacher_views", '{"student": 1}'], "names the student alone"),
        (["--teacher_views", '{"full": 1.5, "none": -0.5}'], "without 'exposed', so exposure_policy 'atesd'"),
        (["--teacher_views", '{"full": 2, "none": -1}', "--exposure_policy", "fixed", "--fixed_alpha", "0"], "'fixed'"),
        (["--teacher_views", json.dumps(CONTRAST), "--objective", "policy_gradient"], "for a divergence only"),
        (["--teacher_views", json.dumps(CONTRAST), "--objective", "sft", "--exposure_policy", "full"], "a divergence"),
    ],
)
def test_views_that_cannot_be_used_are_refused_before_anything_loads(flags, told):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", flags)
    assert told in str(caught.value)


def test_plans_count_a_forward_for_each_view_but_the_students(tiny_config, capsys):
    from atesd.models.loading import load_model_config
    from atesd.planning.dry_run import dry_run
    from atesd.planning.memory_plan import plan_memory
    from atesd.planning.model_shape import model_shape
    from atesd.planning.time_plan import plan_products

    def planned(**weights):
        config = tiny_config(teacher_views=views(**weights))
        shape = model_shape(load_model_config(config), config)
        return plan_products(shape, config, 20).teacher, plan_memory(shape, config, 20, "cpu").total

    (one, plain), (two, mixed), (again, with_student) = (
        planned(exposed=1), planned(exposed=2, none=-1), planned(exposed=2, student=-1)
    )  # fmt: skip
    assert (two, again) == (2 * one, one) and plain < mixed == with_student
    told = str(dry_run(tiny_config(teacher_views=views(**CONTRAST))))
    assert "+1.3 exposed -0.3 answer_only: 2 teacher forwards a response" in told


def test_views_that_read_nothing_are_called_no_signal(tiny_config):
    config = tiny_config(teacher_views=views(none=1), exposure_policy="full")
    with pytest.warns(UserWarning, match="no signal: the teacher reads no reference"):
        Run.build(config).close()
