"""The engine that `rollout_engine` names, and what can be refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from atesd.config import ATESDConfig, doors
from atesd.models.vocabulary import entries_to_sample
from atesd.parallel.processes import Processes
from atesd.rollout.engine import RolloutEngine, RolloutError, require_vllm
from atesd.rollout.seeds import ResponseSeeds


def check_processes(config: ATESDConfig, processes: Processes) -> None:
    """Raises RolloutError, before anything is loaded, if the engine is not installed, or if several processes use a
    setting that supports only one."""
    if config.rollout_engine == "vllm":
        require_vllm()
    if processes.count == 1:
        return
    if config.rollout_engine == "vllm":
        raise RolloutError(
            f"rollout_engine is 'vllm' and {processes.count} processes train: vLLM inside the training process works "
            "with one. Start a server with `vllm serve` on other GPUs and set rollout_engine to 'vllm_server', or to "
            "'hf'."
        )
    if config.max_staleness:
        raise RolloutError(
            f"max_staleness is {config.max_staleness} and {processes.count} processes train: a checkpoint holds the "
            "rollouts that one process has under way. Set max_staleness to 0, or start one process."
        )


def make_engine(config: ATESDConfig, model: Any, tokenizer: Any, processes: Processes | None = None) -> RolloutEngine:
    """The engine `config.rollout_engine` names, for this one of `processes`; each draws other responses.

    Args:
        config: the settings of a run, or of an evaluation under the names that a run has for them.
        model, tokenizer: the student and its tokenizer.
        processes: those that train together; None: this one alone.

    Raises:
        ConfigError: an unknown name, or `module:object` that cannot be imported, does not take `rollout_kwargs` or
            makes no RolloutEngine.
        RolloutError: vLLM is not installed, its server does not answer or cannot hold the run's prompts, or several
            processes would each hold a vLLM.
    """
    processes = Processes() if processes is None else processes
    doors.check_name("rollout_engine", config.rollout_engine)
    check_processes(config, processes)
    kwargs = json.loads(config.rollout_kwargs)
    if not doors.is_object(config.rollout_engine):
        return ENGINES[config.rollout_engine](config, model, tokenizer, processes, **kwargs)
    engine = doors.engine_factory(config.rollout_engine, kwargs)(config, model, tokenizer, processes, **kwargs)
    doors.require_methods("rollout_engine", config.rollout_engine, engine, doors.ENGINE_METHODS)
    return engine


def response_seeds(config: ATESDConfig, processes: Processes) -> ResponseSeeds:
    return ResponseSeeds(config.seed, processes.rank, processes.count)


def hf(config: ATESDConfig, model: Any, tokenizer: Any, processes: Processes) -> RolloutEngine:
    from atesd.rollout.hf import HFEngine

    return HFEngine(
        model,
        tokenizer,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seeds=response_seeds(config, processes),
        bf16=config.bf16,
        entries=entries_to_sample(config, tokenizer),
    )


def vllm(config: ATESDConfig, model: Any, tokenizer: Any, processes: Processes) -> RolloutEngine:
    from atesd.rollout.vllm import VLLMEngine

    return VLLMEngine.from_config(config, model, tokenizer, response_seeds(config, processes))


def vllm_server(config: ATESDConfig, model: Any, tokenizer: Any, processes: Processes) -> RolloutEngine:
    from atesd.rollout.vllm_server import VLLMServerEngine

    return VLLMServerEngine.from_config(config, model, tokenizer, response_seeds(config, processes), processes)


ENGINES: dict[str, Callable[..., RolloutEngine]] = {"hf": hf, "vllm": vllm, "vllm_server": vllm_server}
