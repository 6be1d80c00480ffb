"""Rollouts by a vLLM server that the user has started (`vllm serve`, OpenAI-compatible).

Requests and answers are token ids, not text. The student's weights are files in a folder that both sides can read: the
adapter alone, or a full checkpoint with the adapter merged. atesd/README.md has the commands to start such a server.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atesd.config import ATESDConfig
from atesd.files import share_with_readers
from atesd.parallel.processes import Processes
from atesd.parallel.sharding import is_sharded, reshard, writer
from atesd.rollout.answer_rules import WEIGHT_RULES, Completion, at, broken_rule, shown
from atesd.rollout.connections import Connections, Refused
from atesd.rollout.engine import ENGINE_WEIGHTS, RolloutError
from atesd.rollout.requests import STOPPED, RequestEngine
from atesd.rollout.seeds import ResponseSeeds
from atesd.rollout.server_client import BUSY, ServerClient, is_passing, reason
from atesd.rollout.vllm import request_settings
from atesd.rollout.vllm_worker import WORKER_EXTENSION
from atesd.rollout.weights import check_merged, check_plain_lora, merged_weights
from atesd.terminal import advance
from atesd_kernels.integrations.head import unwrap

CLOSE_SECONDS = 30.0  # most seconds for the last request
# Most bytes of an answer, and more for each token: its text, number and log-probability.
BYTES, BYTES_A_TOKEN = 1 << 20, 1 << 10
NOT_FOUND = 404
FOR_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank {rank}"
FOR_ALL_WEIGHTS = f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls {WORKER_EXTENSION}"


class VLLMServerEngine(ServerClient, RequestEngine):
    """Samples from the student's copy in a vLLM server.

    Args:
        model: the student, bare or under peft.
        base_url: URL of the server, e.g. `http://localhost:8000`.
        folder: folder for the weights that the server reads; the engine owns it and removes it at the end.
        dtype: dtype of the written weights.
        merged: with LoRA, send merged weights, not the adapter.
        processes: the processes of the run: each requests its own responses; only the main one sends weights.
        **requests: as in `RequestEngine`; the server's own context length must be at least `context_length`.

    Raises:
        ModelError: an adapter that the server does not know, or that cannot be merged.
        RolloutError: no server answers, or its context is too short.
    """

    pause = 5.0
    setting = "vllm_server_base_url"
    nonfinite = False  # a server that sends such numbers is broken: vLLM's answers with an error in their place

    def __init__(
        self,
        model: nn.Module,
        base_url: str,
        *,
        folder: Path,
        dtype: torch.dtype,
        merged: bool = False,
        processes: Processes | None = None,
        **requests: Any,
    ):
        super().__init__(**requests)
        self.model, self.url, self.folder, self.dtype = model, base_url.rstrip("/"), folder, dtype
        self.processes = Processes() if processes is None else processes
        self.lora = hasattr(model, "peft_config") and not merged
        (check_plain_lora if self.lora else check_merged)(model)
        self.adapter, self.lost = None, False
        self.connections = Connections()
        self.answer_limit = BYTES + BYTES_A_TOKEN * self.context_length
        served = self.served_model()
        self.base = self.served = served["id"]
        if (served.get("max_model_len") or self.context_length) < self.context_length:
            raise RolloutError(
                f"the vLLM server at {self.url} has a context of {served['max_model_len']} tokens; prompts and "
                f"responses of this run need {self.context_length}: start it with --max-model-len "
                f"{self.context_length}, or lower max_prompt_length or max_completion_length."
            )

    @classmethod
    def from_config(
        cls,
        config: ATESDConfig,
        model: nn.Module,
        tokenizer: Any,
        seeds: ResponseSeeds | None = None,
        processes: Processes | None = None,
    ) -> VLLMServerEngine:
        return cls(
            model,
            config.vllm_server_base_url,
            folder=Path(config.output_dir).absolute() / ENGINE_WEIGHTS,
            dtype=torch.bfloat16 if config.bf16 else getattr(torch, config.torch_dtype),
            merged=config.vllm_server_weights == "merged",
            processes=processes,
            seeds=seeds,
            **request_settings(config, model, tokenizer),
        )

    def sync(self) -> None:
        """Sends the student's weights: the main process writes them and makes the server load them. All processes wait
        for the result, and all raise an error if it fails."""
        write = self.writer()
        self.served, problem = self.processes.broadcast_from_main(self.try_to_send, write)
        self.lost = False
        if problem:
            raise RolloutError(problem)

    def try_to_send(self, write: Callable[[Path], None]) -> tuple[str, str | None]:
        """Writes and loads the weights; retries if the connection fails. Returns (served name, error or None)."""
        # keep the files until the next `sync`: a restarted server must load these, not a student in mid-update
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write(self.folder)
        share_with_readers(self.folder)  # the server may be another user's
        for attempt in range(1 + self.retries):
            time.sleep(self.pause * attempt)
            try:
                self.load()
                return self.served, None
            except RolloutError as error:
                return self.served, str(error)
            except OSError as error:
                problem = reason(error)
        return self.served, (
            f"the student's weights did not reach the vLLM server at {self.url} in {1 + self.retries} tries: {problem}"
        )

    def writer(self) -> Callable[[Path], None]:
        """Returns a function that writes the weights. All processes must call this: it gathers sharded weights."""
        reshard(self.model)
        if self.lora:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            return partial(writer(self.model, trained), save_embedding_layers=False)
        if not is_sharded(self.model):  # merges one matrix at a time while writing
            return lambda folder: self.write_checkpoint(folder, merged_weights(self.model, self.dtype))
        return partial(self.write_checkpoint, weights=list(merged_weights(self.model, self.dtype)))

    def load(self) -> None:
        if self.lora:
            self.load_adapter()
        else:
            self.load_checkpoint()

    def load_adapter(self) -> None:
        """Loads the adapter under a new unique name: the server's prefix cache identifies adapters by name only."""
        name, previous = f"atesd-{uuid.uuid4().hex[:12]}", self.adapter
        rank = max(peft.r for peft in self.model.peft_config.values())
        with refused_as(f"take LoRA adapters. Start it as: {FOR_LORA.format(rank=rank)}"):
            self.change_weights("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder)})
        self.adapter = self.served = name
        self.unload(previous)

    def unload(self, adapter: str | None, timeout: float | None = None) -> None:
        if adapter is not None:
            with contextlib.suppress(Refused):  # a restarted server does not have it
                self.ask("/v1/unload_lora_adapter", {"lora_name": adapter}, timeout)

    def write_checkpoint(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        unwrap(self.model).config.save_pretrained(folder)
        named = {name: tensor.contiguous() for name, tensor in weights}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})

    def load_checkpoint(self) -> None:
        with refused_as(f"take weights. Start it as: {FOR_ALL_WEIGHTS}"):
            self.change_weights("/collective_rpc", {"method": "load_student", "args": [str(self.folder)]})
            self.change_weights("/reset_prefix_cache", {})

    def change_weights(self, path: str, body: dict[str, Any]) -> None:
        """Raises ConnectionError unless the answer says that the change was made."""
        if problem := broken_rule(WEIGHT_RULES[path], self.ask(path, body), body):
            raise ConnectionError(problem)

    def complete(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[Completion | Exception]:
        if self.lost and self.processes.count > 1 and not self.lora:  # an adapter's unique name already detects this
            lost = f"the vLLM server at {self.url} did not answer, and may have lost the student's weights since"
            return [RolloutError(f"{lost}: they are sent again when the run is resumed.")] * len(prompts)
        if self.lost and self.processes.count == 1:  # a restarted server has the base model's weights
            try:
                self.load()
            except OSError as error:
                return [error] * len(prompts)
            self.lost = False
        return self.all_at_once(self.complete_one, prompts, parameters, note=counted)

    def complete_one(self, prompt: list[int], parameters: dict[str, Any]) -> Completion | Exception:
        if self.stopped.is_set():  # set while this request waited in the pool
            return RolloutError(STOPPED)
        body = {"model": self.served, "prompt": prompt, "return_token_ids": True, **parameters}
        try:
            answer = self.ask("/v1/completions", body)
        except Refused as error:
            self.lost |= error.status == NOT_FOUND  # the server lost the adapter
            kind = ConnectionError if error.status == NOT_FOUND or is_passing(error) else RolloutError
            return kind(f"the vLLM server at {self.url} refused a request: {error}")
        except OSError as error:
            self.lost = True
            return error
        choice = at(answer, "choices", 0)
        if not isinstance(choice, dict):
            return ConnectionError(f"the server at {self.url} did not return a completion but {shown(answer)}")
        if choice.get("token_ids") is None:
            return RolloutError(
                f"the server at {self.url} does not return token ids (return_token_ids): use vLLM 0.10.2 or later."
            )
        return Completion(choice["token_ids"], at(choice, "logprobs", "token_logprobs"), choice.get("finish_reason"))

    def release(self) -> None:
        """No-op: this process does not manage the server's memory."""

    def close(self) -> None:
        """Unloads the adapter and removes the weights' folder. The user's server keeps running."""
        self.stop()
        if self.processes.is_main:
            self.connections = Connections()
            with contextlib.suppress(OSError):
                self.unload(self.adapter, timeout=CLOSE_SECONDS)
            shutil.rmtree(self.folder, ignore_errors=True)


class refused_as:
    """Context that converts a server's refusal to a RolloutError. `what`: what it does not do, and the remedy."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Refused) and error.status not in BUSY:
            raise RolloutError(f"the vLLM server does not {self.what}\nIts answer: {reason(error)}") from error


def counted(answer: Completion | Exception) -> Completion | Exception:
    advance(int(isinstance(answer, Completion)))
    return answer
