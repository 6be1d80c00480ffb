"""Engines that answer requests: what is asked for again, what is refused, and that a failure costs a run nothing."""

from __future__ import annotations

import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atesd.config import ATESDConfig
from atesd.parallel.processes import Processes
from atesd.planning.memory_plan import plan_memory
from atesd.planning.model_shape import model_shape
from atesd.rollout import RolloutError, Sampling, check_processes
from atesd.rollout.ahead import AheadEngine
from atesd.rollout.answer_rules import Completion
from atesd.rollout.requests import RequestEngine
from atesd.rollout.seeds import ResponseSeeds
from atesd.rollout.vllm import kv_cache_bytes, request_settings
from atesd.rollout.vllm_server import VLLMServerEngine
from atesd.rollout.weights import merged_weights
from atesd.run import Run
from atesd.trainer import Trainer

STOP = 2
GOOD = Completion([7, STOP], [-0.5, -0.25], "stop")


class Scripted(RequestEngine):
    """Answers the n-th call with what `script[n]` makes of each prompt; after the script everything succeeds."""

    def __init__(self, *script: Callable[[list[int]], object], **settings):
        super().__init__(
            **{"stop_ids": [STOP], "context_length": 32, "vocab_size": 300, "max_completion_length": 8, **settings}
        )
        self.script, self.calls = list(script), []

    def complete(self, prompts, parameters):
        self.calls.append((prompts, parameters))
        answer = self.script.pop(0) if self.script else lambda prompt: GOOD
        return [answer(prompt) for prompt in prompts]


def test_every_response_has_a_seed_of_its_own_and_a_saved_state_continues_them():
    engine = Scripted(seeds=ResponseSeeds(3))
    engine.generate([[5], [5]])
    state = engine.state_dict()
    engine.generate([[5], [5]])
    seeds = [p["seed"] for _, parameters in engine.calls for p in parameters]
    assert len(set(seeds)) == 4
    again = Scripted(seeds=ResponseSeeds(3))
    again.load_state_dict(state)
    again.generate([[5], [5]])
    assert [p["seed"] for p in again.calls[0][1]] == seeds[2:]


def test_evaluation_samples_as_it_says_and_moves_no_seed_of_training():
    engine = Scripted()
    before = engine.state_dict()
    sampling = Sampling(max_completion_length=4, temperature=0.5, top_p=0.9, top_k=3, seeds=(11, 12))
    engine.generate([[5], [6]], sampling)
    asked = engine.calls[0][1]
    assert [(p["seed"], p["temperature"], p["top_p"], p["top_k"], p["max_tokens"]) for p in asked] == [
        (11, 0.5, 0.9, 3, 4),
        (12, 0.5, 0.9, 3, 4),
    ]
    assert engine.state_dict() == before


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (Completion([], [], "stop"), "empty response"),
        (Completion([7], [-1.0], "abort"), "finish reason 'abort'"),
        (Completion([7, 8], [-1.0, -1.0], "stop"), "stopped at token 8"),
        (Completion([7, STOP], None, "stop"), "log-probability"),
        (TimeoutError("no answer in 3 s"), "no answer in 3 s"),
        (ConnectionError("refused"), "refused"),
    ],
)
def test_an_unusable_answer_is_asked_for_again_alone_with_the_same_seed_and_then_refused_by_name(bad, named):
    once = Scripted(lambda prompt: bad if prompt == [6] else GOOD)
    rollouts = once.generate([[5], [6], [7]])
    assert [r.prompt_ids for r in rollouts] == [[5], [6], [7]]
    assert all(r.response_ids == [7, STOP] and r.logprobs == [-0.5, -0.25] and not r.truncated for r in rollouts)
    (_, first), (prompts, second) = once.calls
    assert prompts == [[6]] and second == [first[1]]

    always = Scripted(*[lambda prompt: bad] * 3)
    with pytest.raises(RolloutError, match=f"1 of 1 rollouts failed 3 times.*{named}"):
        always.generate([[5]])
    assert always.state_dict() == {"asked": 0}, "what failed counts as not asked"


def test_a_response_cut_by_its_length_is_truncated_and_one_without_finite_log_probs_is_not_finite():
    nan = float("nan")
    engine = Scripted(lambda prompt: Completion([7] * 8, [-1.0] * 7 + [-1.0 if prompt == [5] else nan], "length"))
    cut, broken = engine.generate([[5], [6]])
    assert cut.truncated and cut.finite
    assert not broken.truncated and not broken.finite


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_asked():
    engine = Scripted()
    with pytest.raises(RolloutError, match=r"prompt of 25 tokens and a response of up to 8 .* context of 32"):
        engine.generate([[5], [6] * 25])
    assert engine.calls == []


def test_a_run_whose_engine_dies_is_saved_and_goes_on_as_if_nothing_had_happened(tiny_config, tmp_path):
    def metrics(run_dir):
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        moving = {"tokens_per_second", "peak_memory_bytes"}
        return [{k: v for k, v in row.items() if not k.startswith("seconds_") and k not in moving} for row in rows]

    settings = {"max_steps": 4, "save_steps": 10, "hold_window": 2}
    whole = Trainer(Run.build(tiny_config(**settings, output_dir=str(tmp_path / "whole")))).train()

    config = tiny_config(**settings, output_dir=str(tmp_path / "cut"))
    trainer = Trainer(Run.build(config))
    generate, calls = trainer.run.rollout.engine.generate, []

    def dies_at_the_third(prompts):
        calls.append(prompts)
        if len(calls) == 3:
            raise RolloutError("the engine is gone.")
        return generate(prompts)

    trainer.run.rollout.engine.generate = dies_at_the_third
    with pytest.raises(RolloutError, match=r"engine is gone.\nThe run is saved as it was after step 2.*--resume"):
        trainer.train()
    config.resume = config.output_dir
    resumed = Trainer(Run.build(config)).train()
    assert metrics(resumed) == metrics(whole)


def test_merged_weights_are_those_peft_merges(tiny_model_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    streamed = dict(merged_weights(model, torch.float32))
    kept = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    expected = dict(model.merge_and_unload().named_parameters())
    assert streamed.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(streamed[name], weight, rtol=1e-6, atol=1e-6)
    assert {w.dtype for _, w in merged_weights(base, torch.bfloat16)} == {torch.bfloat16}


def test_the_cache_holds_a_steps_rollouts_at_their_longest(tiny_model_path):
    config = ATESDConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_generations=5,
        max_prompt_length=100,
        max_completion_length=100,
    )
    # 2 layers, 2 key-value heads of 8, keys and values, 2 bytes; 200 tokens are two blocks of 128
    a_token = 2 * 2 * 2 * 8 * 2
    expected = (2 * 3 * 5 * 2 + 1) * 128 * a_token
    model_config = AutoConfig.from_pretrained(tiny_model_path)
    assert kv_cache_bytes(model_config, config, torch.bfloat16) == expected
    evaluated = replace(config, gradient_accumulation_steps=1, num_generations=1, eval_max_completion_length=1000)
    assert kv_cache_bytes(model_config, evaluated, torch.bfloat16) == (9 + 1) * 128 * a_token, "1,100 tokens of one"
    plan = plan_memory(model_shape(model_config, config), config, 100)
    assert plan.kv_cache == 2 * 3 * 5 * 200 * a_token * 2, "the plan's, which here is in float32"


@pytest.mark.parametrize(("teacher", "bound"), [("frozen", 330), ("ema", 330), ("model", 300)])
def test_another_model_as_teacher_bounds_the_tokens_of_an_answer_by_the_tokenizer(tiny_model_path, teacher, bound):
    """A head of 330 rows, of which the tokenizer knows 300: another model may have no embedding for the rest."""
    model_config = AutoConfig.from_pretrained(tiny_model_path)
    model_config.vocab_size = 330
    model, tokenizer = AutoModelForCausalLM.from_config(model_config), AutoTokenizer.from_pretrained(tiny_model_path)
    config = ATESDConfig(teacher=teacher, teacher_model_name_or_path="a/b" if teacher == "model" else None)
    assert request_settings(config, model, tokenizer)["vocab_size"] == bound
    model.config.vocab_size = 299  # Gemma 3's tokenizer has a token more than its head
    assert request_settings(config, model, tokenizer)["vocab_size"] == 299


def adapter_in(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def test_ids_go_to_the_server_and_come_back_under_the_name_of_the_newest_adapter(connect, server, tmp_path):
    engine = connect()
    engine.sync()
    engine.sync()
    (rollout,) = engine.generate([[5, 6]])
    assert rollout.response_ids == [7, STOP] and rollout.logprobs == [-0.5, -0.25]
    paths = [path for path, _ in server.seen]
    assert paths == ["/v1/load_lora_adapter"] * 2 + ["/v1/unload_lora_adapter", "/v1/completions"]
    first, second, dropped, asked = (body for _, body in server.seen)
    assert first["lora_name"] != second["lora_name"] == asked["model"]
    assert dropped == {"lora_name": first["lora_name"]}
    assert asked["prompt"] == [5, 6] and asked["return_token_ids"] and asked["stop_token_ids"] == [STOP]
    engine.close()
    assert server.seen[-1] == ("/v1/unload_lora_adapter", {"lora_name": second["lora_name"]})
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def test_no_run_names_an_adapter_as_another_did(connect, server):
    for _ in range(2):  # an adapter that is still there is refused, and the cache knows adapters by their names
        connect().sync()
    first, second = (body["lora_name"] for _, body in server.seen)
    assert first != second


def test_a_server_that_forgot_the_adapter_gets_it_again_as_it_was_at_the_sync(connect, server):
    engine = connect()
    engine.sync()
    synced = adapter_in(server.seen[0][1]["lora_path"])
    for p in engine.model.parameters():  # an update under way while rollouts are generated ahead
        torch.nn.init.constant_(p, 0.125)
    server.statuses = [404]
    assert engine.generate([[5]])[0].response_ids == [7, STOP]
    assert [path for path, _ in server.seen[1:4]] == [
        "/v1/completions",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ]
    again = adapter_in(server.seen[2][1]["lora_path"])
    assert synced.keys() == again.keys() and all(torch.equal(w, again[name]) for name, w in synced.items())
    engine.sync()
    assert all((w == 0.125).all() for w in adapter_in(server.seen[-2][1]["lora_path"]).values())


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(connect, server):
    engine = connect()
    server.statuses = [503, 429]
    assert engine.generate([[5]])[0].response_ids == [7, STOP]
    server.statuses = [400]
    with pytest.raises(RolloutError, match=r"refused a request: 400 .*as scripted"):
        engine.generate([[5]])
    assert len(server.seen) == 4


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n"
BROKEN = {
    "cut off": HEAD % 500 + b'{"choices": [{"tok',
    "not HTTP": b"\x15\x03\x01\x00\x02\r\n\r\n",
    "a proxy's page": HEAD % 13 + b"<html></html>",
    "an error": HEAD % 18 + b'{"error": "wrong"}',
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_is_none_is_asked_for_again_and_then_refused_by_name(connect, server, answer):
    engine = connect()
    engine.sync()
    server.answers = [answer]
    assert engine.generate([[5]])[0].response_ids == [7, STOP]
    server.answers = [answer] * 20
    with pytest.raises(RolloutError, match="server"):
        engine.generate([[5]])
    if answer in (BROKEN["cut off"], BROKEN["not HTTP"]):  # what a load of weights answers otherwise is not read
        server.answers = [answer] * 20
        with pytest.raises(RolloutError, match=r"did not reach the vLLM server .* in 3 tries"):
            engine.sync()


@pytest.mark.parametrize("settings", [{"rollout_engine": "vllm"}, {"max_staleness": 1}], ids=["in process", "ahead"])
def test_what_one_training_process_alone_can_do_is_refused_for_two(settings, monkeypatch):
    monkeypatch.setattr("atesd.rollout.engine.find_spec", lambda name: name)  # vLLM as if it were installed
    processes = Processes()
    config = ATESDConfig(**{"rollout_engine": "vllm_server", **settings})
    check_processes(config, processes)
    processes.count = 2
    with pytest.raises(RolloutError, match="2 processes train"):
        check_processes(config, processes)


def test_a_server_that_cannot_be_used_is_refused_before_training_with_the_remedy(connect, server):
    with pytest.raises(RolloutError, match=r"context of 32 tokens; .* need 64: start it with --max-model-len 64"):
        connect(context_length=64)
    engine = connect()
    server.statuses = [404]
    with pytest.raises(RolloutError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True .*--max-lora-rank 4"):
        engine.sync()
    server.seen.clear()
    server.statuses = [503, 429]
    engine.sync()
    assert [path for path, _ in server.seen] == ["/v1/load_lora_adapter"] * 3, "a busy server is asked again"
    server.shutdown()
    server.server_close()
    with pytest.raises(RolloutError, match=r"no vLLM server answers at vllm_server_base_url"):
        connect()
    with pytest.raises(RolloutError, match=r"did not reach the vLLM server .* in 3 tries"):
        engine.sync()


@pytest.fixture
def hanging(server) -> Iterator[ThreadingHTTPServer]:
    """The server, which does not answer completions before the test is over; `asked` is set when it has one."""
    server.asked, over = threading.Event(), threading.Event()

    def look(path, body):
        if path == "/v1/completions":
            server.asked.set()
            over.wait(120)

    server.look = look
    yield server
    over.set()


PROMPT = 20.0  # seconds, of a busy machine, in which nothing waits for an answer that takes 120


def test_closing_ends_the_rollouts_generated_ahead(connect, hanging, monkeypatch):
    engine = AheadEngine(connect())
    engine.sync()
    monkeypatch.setattr(VLLMServerEngine, "pause", 120.0)
    engine.begin([[5]] * 300)  # more than there are connections
    assert hanging.asked.wait(60)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < PROMPT
    with pytest.raises(RolloutError, match="stopped while it was generating"):
        engine.generate([[5]] * 300)
    assert hanging.seen[-1][0] == "/v1/unload_lora_adapter", "what was sent is taken back all the same"


@pytest.fixture
def python_handles_ctrl_c():
    """Whatever the shell that started the tests has set: it may have told its children to ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks, gc.callbacks[:] = gc.callbacks[:], []  # Hypothesis has one, and an exception in it is ignored
    yield
    gc.callbacks[:] = callbacks
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_does_not_wait_for_the_rollouts_under_way(connect, hanging, python_handles_ctrl_c):
    engine = connect()
    main = threading.main_thread().ident

    def interrupt():
        assert hanging.asked.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5]] * 3)
    assert time.monotonic() - started < PROMPT
    asked = len(hanging.seen)
    with pytest.raises(RolloutError, match="stopped while it was generating"):
        engine.generate([[5]])
    assert len(hanging.seen) == asked
