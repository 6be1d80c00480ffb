"""When vLLM in the training process holds the GPU's memory, and how much: its calls, in order, with vLLM played by a
stand-in and the GPU by torch's meta device. What the real vLLM does is in tests/vllm_rollouts."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from atesd.models.loading import load_model_and_tokenizer
from atesd.planning.model_shape import cached_numbers, key_size
from atesd.rollout.vllm import BLOCK, VLLMEngine
from atesd_kernels.integrations.head import unwrap


class LLM:
    """Notes what it is asked for."""

    def __init__(self, path: str, **options):
        self.options, self.calls = options, []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def collective_rpc(self, method: str, args: tuple) -> None:
        self.calls.append(f"{method}, {len(list(args[0]))} tensors")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("forget the cache")
        return True


@pytest.fixture
def engine_on(tiny_config, monkeypatch):
    stand_in = ModuleType("vllm")
    stand_in.LLM = LLM
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr("atesd.rollout.engine.find_spec", lambda name: name)
    monkeypatch.setattr("atesd.rollout.vllm.check_merged", lambda model: None)  # meta has no numbers to compare

    def make(device: str, **changes):
        config = tiny_config(rollout_engine="vllm", num_generations=3, **changes)
        model, tokenizer = load_model_and_tokenizer(config)
        engine = VLLMEngine.from_config(config, model.to(device), tokenizer)
        engine.complete = lambda prompts, parameters: engine.llm.calls.append("generate") or []
        return engine, config

    return make


def test_on_a_gpu_the_engine_sleeps_while_the_student_is_updated(engine_on):
    engine, _ = engine_on("meta")
    assert engine.llm.options["enable_sleep_mode"] is True
    tensors = sum(1 for name, _ in unwrap(engine.model).named_parameters() if ".lora_" not in name)
    load = f"load_student, {tensors} tensors"
    for step in range(2):
        engine.llm.calls.clear()
        engine.sync()
        engine.complete([], [])
        engine.release()
        engine.release()  # a second one finds it asleep
        # weights come into memory that is there again, and keys and values only after them
        awake = [load] if step == 0 else ["wake weights", load, "wake kv_cache"]
        assert engine.llm.calls == [*awake, "forget the cache", "generate", "sleep 2"]
    engine.close()
    assert engine.llm.calls[-1] == "shutdown"


@pytest.mark.parametrize(("device", "settings"), [("cpu", {}), ("meta", {"vllm_enable_sleep_mode": False})])
def test_on_a_cpu_and_where_it_is_switched_off_it_never_sleeps(engine_on, device, settings):
    engine, _ = engine_on(device, **settings)
    assert engine.llm.options["enable_sleep_mode"] is False
    engine.sync()
    engine.release()
    assert [call.split(",")[0] for call in engine.llm.calls] == ["load_student", "forget the cache"]


def test_the_cache_is_as_large_as_the_memory_plan_says_for_all_rollouts_of_a_step(engine_on):
    engine, config = engine_on("meta", vllm_kv_cache_bytes=None)
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * 3
    tokens = rollouts * (config.max_prompt_length + config.max_completion_length)
    model_config = unwrap(engine.model).config
    of_a_token = cached_numbers(model_config.num_hidden_layers, key_size(model_config)) * engine.dtype.itemsize
    more = engine.llm.options["kv_cache_memory_bytes"] - tokens * of_a_token
    assert 0 <= more < (rollouts + 1) * BLOCK * of_a_token + 1, "in whole blocks, and one that vLLM keeps"
    assert engine_on("meta", vllm_kv_cache_bytes=12345)[0].llm.options["kv_cache_memory_bytes"] == 12345
