"""A run small enough for a test: the tiny random Llama on a few worked sums."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.config import ATESDConfig


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """A model this small is slower on two threads, and much slower on two threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(tiny_model_path: Path, sums: Path, tmp_path: Path) -> Callable[..., ATESDConfig]:
    """Settings of a run of a few steps; keyword arguments change them."""

    def make(**changes) -> ATESDConfig:
        settings = {
            "model_name_or_path": str(tiny_model_path),
            "dataset_name": str(sums),
            "num_probe_problems": 2,
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_prompt_length": 512,
            "max_completion_length": 12,
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-3,
            "hold_window": 1,
            "lookahead": 1,
            "policy_batch_size": 2,
            "save_steps": 2,
        }
        return ATESDConfig(**{**settings, **changes})

    return make


def as_process(rank: int, count: int, port: int, variables: dict[str, str], function: Callable, results: Any) -> None:
    """What a launcher and a fresh interpreter would have done, and then `function`."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **variables}
    torch.set_num_threads(1)
    try:
        results.put((rank, function(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def on_processes() -> Callable[..., list]:
    """`on_processes(2, function)`: what `function` returns on each of two gloo processes of this machine.

    They are forked, so that torch is not imported once more by each.
    """

    def run(count: int, function: Callable, **variables: str) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        started = [
            context.Process(target=as_process, args=(rank, count, port, variables, function, results))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        returned: dict[int, Any] = {}
        try:
            for _ in started:
                rank, value, error = results.get(timeout=240)
                assert error is None, error
                returned[rank] = value
        finally:
            for process in started:
                process.join(None if len(returned) == count else 0)
                process.kill()
        return [returned[rank] for rank in range(count)]

    return run


@pytest.fixture
def start_atesd() -> Iterator[Callable[..., subprocess.Popen]]:
    """`start_atesd("train", ...)`: the command in a process of its own, which does not outlive the test."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "atesd", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def kill_when() -> Callable[[subprocess.Popen, Callable[[], bool]], None]:
    """`kill_when(process, reached)`: SIGKILL as soon as `reached()`, which the process must live to see."""

    def kill(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()

    return kill


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A stand-in for vLLM's server: every response is token 7 and token 2, the end.

    Attributes: `seen`, what was posted, as (path, body); `statuses`, taken in turn, 200 when there are none left;
    `context`, the context length it claims; `look`, called with each path and body before the answer; `answers`, in
    turn, the bytes of whole answers in the place of the usual ones.
    """

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(200, {"data": [{"id": "base", "max_model_len": self.server.context}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, body))
            self.server.look(self.path, body)
            if self.server.answers:
                self.wfile.write(self.server.answers.pop(0))
                return
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            choice = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}
            self.reply(status, {"choices": [choice]} if status == 200 else {"error": "as scripted"})

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen, running.statuses, running.context, running.look = [], [], 32, lambda path, body: None
        running.answers = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
