"""Rollouts by vLLM inside the training process ("colocated").

vLLM loads the student's merged weights, as tensors, before each batch of rollouts. On a GPU the engine sleeps during
training, so that both need not fit in memory at once. vLLM has no sleep mode on a CPU, where nothing is released.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from atesd.config import ATESDConfig
from atesd.models.loading import context_length, model_path
from atesd.models.vocabulary import entries_to_sample
from atesd.planning.model_shape import cached_numbers, key_size
from atesd.rollout.answer_rules import Completion
from atesd.rollout.engine import RolloutError, require_vllm
from atesd.rollout.hf import stop_token_ids
from atesd.rollout.requests import RequestEngine
from atesd.rollout.seeds import ResponseSeeds
from atesd.rollout.vllm_worker import WORKER_EXTENSION
from atesd.rollout.weights import check_merged, merged_weights
from atesd.terminal import advance
from atesd_kernels.integrations.head import unwrap

BLOCK = 128  # tokens in a block of the cache on a CPU; on a GPU they are smaller


class VLLMEngine(RequestEngine):
    """Samples from vLLM's own copy of `model`.

    Args:
        model: the student, bare or under peft.
        path: the folder or Hub id of `model`, for its architecture.
        dtype: dtype of the engine's weights and cache.
        kv_cache_bytes: size of its key-value cache; requests that do not fit wait.
        sleep: release the engine's memory between `release` and `sync`; ignored on a CPU.
        **requests: as in `RequestEngine`.

    Raises:
        ModelError: an adapter that cannot be merged.
        RolloutError: vLLM does not start.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        *,
        dtype: torch.dtype,
        kv_cache_bytes: int,
        sleep: bool = True,
        **requests: Any,
    ):
        super().__init__(**requests)
        require_vllm()
        check_merged(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.model, self.dtype, self.sleep, self.asleep = model, dtype, sleep and not on_cpu, False
        self.requests = 0
        with as_a_guest():
            from vllm import LLM

            try:
                self.llm = LLM(
                    path,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=self.context_length,
                    kv_cache_memory_bytes=kv_cache_bytes,
                    enable_sleep_mode=self.sleep,
                    enforce_eager=on_cpu,  # a compiled CPU graph would keep the packed matrices of its trace
                    skip_tokenizer_init=True,
                    use_tqdm_on_load=False,
                    worker_extension_cls=WORKER_EXTENSION,
                    seed=0,  # every request has its own
                )
            except (ValueError, RuntimeError) as error:
                raise RolloutError(f"vLLM does not start with {path!r}: {error}") from error

    @classmethod
    def from_config(
        cls, config: ATESDConfig, model: nn.Module, tokenizer: Any, seeds: ResponseSeeds | None = None
    ) -> VLLMEngine:
        """Builds the engine from `config`. By default its cache fits all rollouts of a step."""
        dtype = torch.bfloat16 if config.bf16 else getattr(torch, config.torch_dtype)
        return cls(
            model,
            model_path(config.model_name_or_path),
            dtype=dtype,
            kv_cache_bytes=config.vllm_kv_cache_bytes or kv_cache_bytes(unwrap(model).config, config, dtype),
            sleep=config.vllm_enable_sleep_mode,
            seeds=seeds,
            **request_settings(config, model, tokenizer),
        )

    def sync(self) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("load_student", args=(merged_weights(self.model, self.dtype),))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM keeps keys and values of the old weights: a request is still running.")

    def release(self) -> None:
        if self.sleep and not self.asleep:
            self.llm.sleep(level=2)  # level 2 discards the weights: `sync` reloads all of them
            self.asleep = True

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def complete(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[Completion | Exception]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        final = RequestOutputKind.FINAL_ONLY
        indices: dict[str, int] = {}
        answers: list[Completion | Exception] = [TimeoutError(f"no answer in {self.timeout:g} s")] * len(prompts)
        deadline = time.monotonic() + self.timeout
        try:
            with global_randomness_kept():
                for index, (prompt, settings) in enumerate(zip(prompts, parameters, strict=True)):
                    name, self.requests = str(self.requests), self.requests + 1
                    settings = SamplingParams(**settings, detokenize=False, output_kind=final)
                    engine.add_request(name, {"prompt_token_ids": prompt}, settings)
                    indices[name] = index
                while indices and time.monotonic() < deadline:
                    for output in engine.step():
                        if output.finished:
                            answers[indices.pop(output.request_id)] = completion(output.outputs[0])
                            advance(1)
        except Exception as error:
            for index in indices.values():
                answers[index] = error
        finally:
            engine.abort_request(list(indices))
        return answers


def completion(output: Any) -> Completion:
    """Converts vLLM's output. Keeps only the log-probabilities of the sampled tokens."""
    ids = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, output.finish_reason)


def request_settings(config: ATESDConfig, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Returns the arguments of `RequestEngine` from a configuration, for both vLLM engines."""
    rows = unwrap(model).config.get_text_config().vocab_size
    return {
        "context_length": longest_sequence(config, unwrap(model).config),
        "vocab_size": min(rows, entries_to_sample(config, tokenizer) or rows),
        "stop_ids": stop_token_ids(unwrap(model), tokenizer),
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "retries": config.rollout_retries,
        "timeout": config.rollout_timeout,
    }


def longest_sequence(config: ATESDConfig, model_config: Any) -> int:
    """Returns the tokens of the longest prompt plus the longest response, including evaluations during training."""
    response = max(config.max_completion_length, getattr(config, "eval_max_completion_length", None) or 0)
    return min(context_length(model_config), config.max_prompt_length + response)


def kv_cache_bytes(model_config: Any, config: ATESDConfig, dtype: torch.dtype) -> int:
    """Returns the size of a cache for all rollouts of a step at full length, rounded up to blocks, plus one block that
    vLLM reserves. It fits at least one sequence of an evaluation, which vLLM requires to start."""
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_generations
    blocks = rollouts * -(-(config.max_prompt_length + config.max_completion_length) // BLOCK)
    blocks = max(blocks, -(-longest_sequence(config, model_config) // BLOCK))
    text = model_config.get_text_config()
    return (blocks + 1) * BLOCK * cached_numbers(text.num_hidden_layers, key_size(text)) * dtype.itemsize


@contextmanager
def global_randomness_kept() -> Iterator[None]:
    """Restores the global random states. vLLM seeds all of them at its start, and uses them despite request seeds."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def as_a_guest() -> Iterator[None]:
    """Context to start vLLM in this process: quiet, with random states restored, and with `torch.set_num_threads`
    restored, which vLLM disables on a CPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in (("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_NO_USAGE_STATS", "1")):
        os.environ.setdefault(name, value)
    set_num_threads = torch.set_num_threads
    try:
        with global_randomness_kept():
            yield
    finally:
        torch.set_num_threads = set_num_threads
