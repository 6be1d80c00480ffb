"""A stand-in for a vLLM server that teaches: it answers with the true log-probabilities of a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.served_teacher.server import TeacherServer


class Scoring(ThreadingHTTPServer):
    """Attributes: `seen`, the bodies posted to /v1/completions; `max_logprobs` and `context`, its limits; `failing`, a
    function of the number of scored passages: whether the server is broken from then on; `detokenizes`."""

    daemon_threads = True

    def __init__(self, folder: Path, name: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.name = AutoModelForCausalLM.from_pretrained(folder).eval(), name
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.seen, self.max_logprobs, self.context = [], 1000, 2048
        self.failing, self.detokenizes = lambda count: False, True
        self.url = f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def scores(self, body: dict) -> list[dict | None]:
        ids = body["prompt"]
        rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[dict | None] = [None]
        best = rows.topk(body["prompt_logprobs"]).indices.tolist()
        for row, listed, own in zip(rows.tolist(), best, ids[1:], strict=False):
            found.append({str(i): {"logprob": row[i], "rank": 1, "decoded_token": "x"} for i in {*listed, own}})
        return found


class Handler(BaseHTTPRequestHandler):
    server: Scoring

    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"data": [{"id": self.server.name, "max_model_len": self.server.context}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/detokenize":
            if not self.server.detokenizes:
                return self.reply({"detail": "Not Found"}, 404)
            return self.reply({"prompt": self.server.tokenizer.decode(body["tokens"])})
        if self.server.failing(len(self.server.seen)):
            return self.reply({"error": "as scripted"}, 503)
        self.server.seen.append(body)
        if body["prompt_logprobs"] > self.server.max_logprobs:
            what = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
            return self.reply({"error": {"message": what + str(self.server.max_logprobs)}}, 400)
        choice = {"prompt_logprobs": self.server.scores(body), "prompt_token_ids": body["prompt"]}
        self.reply({"choices": [choice]})

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Scoring]]:
    """`serve(folder, name="teacher")` starts a server of the model in `folder`."""
    monkeypatch.setattr(TeacherServer, "pause", 0.0)
    with ExitStack() as running:

        def start(folder: Path, name: str = "teacher") -> Scoring:
            server = running.enter_context(Scoring(folder, name))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            return server

        yield start
