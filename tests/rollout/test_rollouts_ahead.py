"""The next batch generated while this one trains: from which weights, what a kill or failure costs, what is refused."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace

import pytest
import torch

from atesd.errors import ConfigError
from atesd.models.batching import ProblemSampler
from atesd.rollout import Rollout, RolloutError
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.hf import HFEngine
from atesd.rollout.seeds import ResponseSeeds
from atesd.run import Run
from atesd.trainer import Trainer

MOVING = ("tokens_per_second", "peak_memory_bytes")


class Served:
    """What a server is to the trainer: an engine with a copy of the weights, as they were at the last `sync`."""

    def __init__(self, model, tokenizer, config):
        self.student, self.copy = model, copy.deepcopy(model)
        sampling = {name: getattr(config, name) for name in ("max_completion_length", "temperature", "top_p", "top_k")}
        self.hf = HFEngine(self.copy, tokenizer, seeds=ResponseSeeds(config.seed), **sampling)
        self.release, self.close = self.hf.release, self.hf.close
        self.state_dict, self.load_state_dict = self.hf.state_dict, self.hf.load_state_dict
        self.log: list[str] = []

    def sync(self):
        self.copy.load_state_dict(self.student.state_dict())

    def generate(self, prompts, sampling=None):
        rollouts = self.hf.generate(prompts, sampling)
        return [replace(r, logprobs=[-1.0] * len(r.response_ids)) for r in rollouts]


@pytest.fixture
def trainer_of(tiny_config, tmp_path, monkeypatch):
    """A trainer whose engine is a `Served`; `served` of it is that engine."""

    def make(name="run", **changes) -> Trainer:
        made = []

        def engine(config, model, tokenizer, rank):
            made.append(Served(model, tokenizer, config))
            return made[-1]

        monkeypatch.setattr("atesd.run_parts.make_engine", engine)
        settings = {"rollout_engine": "vllm_server", "max_staleness": 1, "max_steps": 4, "save_steps": 1}
        trainer = Trainer(Run.build(tiny_config(**{**settings, "output_dir": str(tmp_path / name), **changes})))
        trainer.served = made[0]
        return trainer

    return make


def rows_of(run_dir, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds_") and k not in MOVING} for row in rows]


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in sorted(model.named_parameters()) if "lora_" in name])


def test_every_batch_after_the_first_comes_from_the_student_before_the_last_update(trainer_of):
    trainer = trainer_of()
    sampled_from, trained = [], []
    generate, step = trainer.served.generate, trainer.train_step

    def recorded(prompts, sampling=None):
        sampled_from.append(weights_of(trainer.served.copy))
        return generate(prompts, sampling)

    def recorded_step(t):
        trained.append(weights_of(trainer.run.student.model))
        return step(t)

    trainer.served.generate, trainer.train_step = recorded, recorded_step
    run_dir = trainer.train()
    assert [row["staleness"] for row in rows_of(run_dir)] == [0, 1, 1, 1]
    assert len(sampled_from) == 4, "the last step begins no batch that nobody trains on"
    for t, source in enumerate(sampled_from):
        assert torch.equal(source, trained[max(0, t - 1)])
        assert t == 0 or not torch.equal(source, trained[t]), "the update is to have changed the weights"


def test_the_update_does_not_wait_for_the_next_batch(trainer_of):
    trainer = trainer_of(max_steps=2)
    updated = threading.Event()
    generate, update, calls = trainer.served.generate, trainer.update, []

    def slow_the_second_time(prompts, sampling=None):
        calls.append(prompts)
        if len(calls) == 2:
            assert updated.wait(60), "the first step's update comes while its successor's rollouts are generated"
        return generate(prompts, sampling)

    def telling(loss):
        norm = update(loss)
        updated.set()
        return norm

    trainer.served.generate, trainer.update = slow_the_second_time, telling
    assert [row["staleness"] for row in rows_of(trainer.train())] == [0, 1]


def test_without_staleness_every_batch_comes_from_the_student_as_it_is(trainer_of):
    trainer = trainer_of(max_staleness=0, max_steps=2)
    assert not isinstance(trainer.run.rollout.engine, AheadEngine)
    assert [row["staleness"] for row in rows_of(trainer.train())] == [0, 0]


def test_a_killed_run_trains_on_the_batch_that_was_generated_before_it_was_saved(trainer_of):
    settings = {"importance_clip": 2.0, "num_eval_problems": 2, "eval_steps": 2, "eval_k": 1, "save_steps": 2}
    whole = trainer_of("whole", **settings).train()

    cut = trainer_of("cut", **settings)
    step = cut.train_step

    def killed(t):
        if t == 3:
            raise KeyboardInterrupt
        return step(t)

    cut.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer_of("cut", **settings, resume=str(cut.run.run_dir))
    assert resumed.run.step == 2, "a step that was done is done again"
    resumed.train()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(cut.run.run_dir, name) == rows_of(whole, name)
    assert [row["staleness"] for row in rows_of(whole) if row["step"]] == [0, 1, 1, 1]
    assert all("importance_weight" in row for row in rows_of(whole) if row["step"])


def test_a_batch_that_fails_ahead_ends_the_run_saved_and_comes_anew_from_the_saved_student(trainer_of):
    trainer = trainer_of(save_steps=10)
    generate, calls = trainer.served.generate, []

    def dies_at_the_third(prompts, sampling=None):
        calls.append(prompts)
        if len(calls) == 3:
            raise RolloutError("the engine is gone.")
        return generate(prompts, sampling)

    trainer.served.generate = dies_at_the_third
    with pytest.raises(RolloutError, match=r"engine is gone.\nThe run is saved as it was after step 2.*--resume"):
        trainer.train()
    resumed = trainer_of(save_steps=10, resume=str(trainer.run.run_dir))
    again, asked = resumed.served.generate, []
    resumed.served.generate = lambda prompts, sampling=None: asked.append(prompts) or again(prompts, sampling)
    rows = rows_of(resumed.train())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1]
    assert asked[0] == calls[2], "the problems of the batch that failed are asked again"


def test_a_teacher_that_fails_leaves_the_batch_that_was_there_before_the_step_for_the_run_that_goes_on(
    trainer_of, server, monkeypatch
):
    """By then the next batch is on its way. It is of a step that was not made, and is not counted."""
    failing = []

    def score(handler):
        ids = handler.body["prompt"]
        listed = [{str(t): {"logprob": -1.0}, str((t + 1) % 300): {"logprob": -2.0}} for t in ids]
        handler.reply(400 if failing else 200, {"choices": [{"prompt_logprobs": listed}]})

    server.context, server.instead = 2048, {"/v1/completions": score}
    url = f"http://127.0.0.1:{server.server_port}"
    served = {"teacher": "vllm_server", "teacher_base_url": url, "teacher_top_k": 1, "scoring_temperature": 1.0}
    whole = trainer_of("whole", **served).train()

    cut = trainer_of("cut", **served, save_steps=10)
    prepare = cut.run.views.prepare

    def fails_at_the_third(*arguments):
        if cut.run.step == 2:
            failing.append(True)
        prepare(*arguments)

    monkeypatch.setattr(cut.run.views, "prepare", fails_at_the_third)
    with pytest.raises(RolloutError, match=r"refused to score a response: 400(.|\n)*saved as it was after step 2"):
        cut.train()
    failing.clear()
    resumed = trainer_of("cut", **served, save_steps=10, resume=str(cut.run.run_dir))
    assert rows_of(resumed.train()) == rows_of(whole)
    assert [row["staleness"] for row in rows_of(whole)] == [0, 1, 1, 1]


def test_nothing_else_is_asked_of_the_engine_while_a_batch_is_on_its_way():
    started, go_on, order = threading.Event(), threading.Event(), []

    class Engine:
        def generate(self, prompts, sampling=None):
            started.set()
            assert go_on.wait(30)
            order.append("generated")
            return [Rollout(p, [7], False) for p in prompts]

        def sync(self):
            order.append("synced")

        def state_dict(self):
            order.append("saved")
            return {}

    for ask in ("sync", "state_dict"):
        engine = AheadEngine(Engine())
        order.clear(), started.clear(), go_on.clear()
        engine.begin([[5]])
        assert started.wait(30)
        threading.Timer(0.05, go_on.set).start()
        getattr(engine, ask)()
        assert order[0] == "generated" and len(order) == 2
        assert engine.generate([[5]]) == [Rollout([5], [7], False, staleness=1)]
    engine.begin([[5]])
    with pytest.raises(AssertionError, match="other prompts than those of this step"):
        engine.generate([[6]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollout_engine": "hf"}, "rollout_engine is 'hf', which samples from the very weights"),
        ({"rollout_engine": "vllm"}, "rollout_engine is 'vllm', which shares process and device"),
        ({"objective": "sft", "exposure_policy": "full"}, "objective 'sft' trains on references"),
        ({"max_staleness": 2}, "max_staleness is 2; it must be 0 or 1"),
    ],
)
def test_what_cannot_be_generated_ahead_is_refused_by_name(tiny_config, changes, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**{"rollout_engine": "vllm_server", "max_staleness": 1, **changes}).validate()


def test_looking_at_the_next_problems_draws_none():
    sampler = ProblemSampler(5, seed=0)
    sampler.draw(3)
    coming = sampler.peek(4)  # over the end of an epoch
    assert sampler.position == 3 and coming == sampler.draw(4)
