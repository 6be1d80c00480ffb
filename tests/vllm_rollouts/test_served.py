"""A server, really started: adapters and whole weights reach it, a run trains with it, and its death costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atesd.config.eval_config import EvalConfig
from atesd.evaluation.command import evaluate
from atesd.models.loading import load_model_and_tokenizer
from atesd.reports.metrics import read_jsonl
from atesd.rollout import RolloutError
from atesd.rollout.vllm_server import VLLMServerEngine
from atesd.rollout.vllm_worker import WORKER_EXTENSION
from atesd.run import Run
from atesd.storage.checkpoint import latest_checkpoint, load_checkpoint
from atesd.trainer import Trainer

from .cases import chat_prompts, check_follows_at_a_sync_alone, disturb, rows_of
from .servers import Server, Servers


@pytest.fixture(scope="module")
def servers(smollm2_dir: Path, tmp_path_factory) -> Iterator[Servers]:
    lora = ("--enable-lora", "--max-lora-rank", "64")
    shared = Servers(smollm2_dir, tmp_path_factory.mktemp("servers"), *lora, "--worker-extension-cls", WORKER_EXTENSION)
    yield shared
    shared.kill()


@pytest.fixture
def server(servers) -> Iterator[Server]:
    yield from servers.lend()


@pytest.mark.model
@pytest.mark.parametrize(
    ("use_peft", "weights"), [(True, "adapter"), (True, "merged"), (False, "merged")], ids=["adapter", "merged", "all"]
)
def test_the_servers_log_probs_follow_the_students_weights_and_only_after_a_sync(
    real_config, server, use_peft, weights
):
    config = real_config(
        rollout_engine="vllm_server",
        vllm_server_base_url=server.url,
        vllm_server_weights=weights,
        use_peft=use_peft,
        temperature=1.0,
        max_completion_length=8,
    )
    model, tokenizer = load_model_and_tokenizer(config)
    engine = VLLMServerEngine.from_config(config, model, tokenizer)
    try:
        check_follows_at_a_sync_alone(engine, model, chat_prompts(tokenizer))
    finally:
        if not engine.lora:  # the server's own weights are others now, and adapters of later tests are for the model's
            engine.model = load_model_and_tokenizer(config)[0]
            engine.sync()


@pytest.mark.model
def test_an_evaluation_asks_the_server_for_every_sample_and_leaves_nothing_behind(smollm2_dir, sums, server, tmp_path):
    config = EvalConfig(
        model_name_or_path=str(smollm2_dir), dataset_name=str(sums), num_problems=2, num_generations=2,
        max_completion_length=8, batch_size=4, num_bootstrap=99, output_dir=str(tmp_path / "e"),
        rollout_engine="vllm_server", vllm_server_base_url=server.url,
    )  # fmt: skip
    folder = evaluate(config)
    rows = read_jsonl(folder / "samples.jsonl")
    assert len({(row["problem_id"], row["sample"]) for row in rows}) == len(rows) == 4
    assert all(0 < row["num_tokens"] <= 8 for row in rows) and len({row["text"] for row in rows}) > 1
    assert not (folder / "engine_weights").exists() and (folder / "results.html").exists()


@pytest.mark.model
def test_a_run_whose_next_rollouts_are_generated_meanwhile_is_saved_when_the_server_dies(
    real_config, server, monkeypatch
):
    monkeypatch.setattr(VLLMServerEngine, "pause", 0.1)
    config = real_config(
        rollout_engine="vllm_server", vllm_server_base_url=server.url, max_staleness=1, importance_clip=2.0,
        max_steps=4, save_steps=10, learning_rate=1e-4,
    )  # fmt: skip
    trainer = Trainer(Run.build(config))
    step = trainer.train_step

    def killing_the_server_before_the_third(t):
        if t == 2:
            trainer.run.rollout.engine.wait()
            server.kill()
        done = step(t)
        if t == 0:
            disturb(trainer.run.student.model)  # an update no rounding hides; the next rollouts were sampled before it
        return done

    trainer.train_step = killing_the_server_before_the_third
    with pytest.raises(RolloutError, match=r"in 3 tries: .*\n.*saved as it was after step 2"):
        trainer.train()
    rows = rows_of(trainer.run.run_dir)
    assert [(row["step"], row["staleness"]) for row in rows] == [(1, 0), (2, 1)]
    assert all(row["seconds_weight_sync"] > 0 and row["importance_weight"] <= 2 for row in rows)
    assert 0 < rows[0]["engine_logprob_diff"] < 0.3 and rows[0]["importance_weight"] == pytest.approx(1, abs=0.3)
    assert rows[1]["engine_logprob_diff"] > 10 * rows[0]["engine_logprob_diff"], "one update lies between"
    saved = load_checkpoint(latest_checkpoint(trainer.run.run_dir))
    assert saved["step"] == 2 and len(saved["engine"]["ahead"]) == 2, "with the batch of the step that is to come"
