"""Fixtures that several rooms share: a tiny random Llama, worked sums, a tiny run, commands, a server like vLLM's.

Nothing here, and no test, needs a model hub: the tiny model is made on the spot, the real one comes from a PyPI wheel.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a test process for each core: threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.profiler import ProfilerActivity, profile

from atesd.config import ATESDConfig
from tests.http_answers import send

if not torch.cuda.is_available():  # the Triton backends are interpreted: triton reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, H=32, V=300, tied head, 2,048 positions), its tokenizer and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["the answer is step by step solution problem so we have then user assistant system " * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert len(tokenizer) <= config.vocab_size
    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a larger random Llama for the tiny one's tokenizer (3 layers, H=48, 320 rows, untied head)."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model_path)
    config.update({"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320})
    config.head_dim, config.tie_word_embeddings = 12, False
    folder = tmp_path_factory.mktemp("other-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 16 worked sums."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [
        {
            "problem": f"Ann has {n} pens and buys {n + 2}. She gives {n} away. How many are left?",
            "solution": f"First she has {n} pens.\n\nThen she has {2 * n + 2}.\n\nShe gives {n} away.\n\n#### {n + 2}",
            "answer": str(n + 2),
        }
        for n in range(1, 17)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once into the user's cache. Mark tests that use it `model`."""
    from atesd.models.smollm import smollm2_path

    return smollm2_path()


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """`peak_bytes(function)`: the most bytes alive at once among those `function` allocates on the CPU."""

    def measure(function: Callable[[], object]) -> int:
        function()  # what is allocated once only is not the call's
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        alive = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        return peak

    return measure


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
def no_report(monkeypatch) -> None:
    """Half of the time of a short run, and tested elsewhere."""
    monkeypatch.setattr("atesd.reports.report.write_report", lambda run_dir: None)


def good_answer(path: str, body: dict) -> object:
    choice = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}
    return {
        "/v1/completions": {"choices": [choice]},
        "/v1/load_lora_adapter": f"Success: LoRA adapter '{body.get('lora_name')}' added successfully.",
        "/collective_rpc": {"results": [None]},
    }.get(path, "")


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A stand-in for vLLM's server: every response is token 7 and token 2, the end.

    Attributes: `seen`, what was posted, as (path, body); `statuses`, taken in turn, 200 when there are none left;
    `context`, the context length it claims; `look`, called with each path and body before the answer; `answers`, in
    turn, the bytes of whole answers in the place of the usual ones; `instead`, a function of the handler, which has the
    posted `body`, for each path that it answers itself.
    """

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            send(self, body, status)

        def do_GET(self):
            if self.path in self.server.instead:
                return self.answer_instead()
            self.reply(200, {"data": [{"id": "base", "max_model_len": self.server.context}]})

        def answer_instead(self):
            with contextlib.suppress(OSError):  # the engine has hung up
                self.server.instead[self.path](self)

        def do_POST(self):
            self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, body))
            self.server.look(self.path, body)
            if self.path in self.server.instead:
                return self.answer_instead()
            if self.server.answers:
                self.wfile.write(self.server.answers.pop(0))
                return
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            self.reply(status, good_answer(self.path, body) if status == 200 else {"error": "as scripted"})

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen, running.statuses, running.context, running.look = [], [], 32, lambda path, body: None
        running.answers, running.instead = [], {}
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
