"""A server that hangs, lies or breaks off: every answer ends in an error with a name, soon, and none is believed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from atesd.rollout import RolloutError
from atesd.rollout.connections import Connections, Refused
from tests.http_answers import send

STOP = 2
LIMIT = 1.0  # seconds that the engine waits for an answer
SOON = 60.0  # seconds, of a busy machine, in which an answer is given up; those that hang take longer
HANG = 240.0


@pytest.fixture
def hostile(server) -> Iterator[ThreadingHTTPServer]:
    """The server, whose answers end with the test at the latest: `over` is set then."""
    server.over = threading.Event()
    yield server
    server.over.set()


def raw(data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: handler.wfile.write(data)


def drip(head: bytes, byte: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Sends `head`, then a byte at a time for ever: each in good time."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        for _ in range(int(HANG / 0.1)):
            handler.wfile.write(byte)
            if handler.server.over.wait(0.1):
                return

    return answer


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.server.over.wait(HANG)


def flood(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(1000):
        handler.wfile.write(b" " * (1 << 20))


def interim(handler: BaseHTTPRequestHandler) -> None:
    while not handler.server.over.wait(0.01):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n"
# Answers that no path may believe.
TRANSPORT = {
    "silence": silent,
    "a drip of the body": drip(HEAD % 5000, b" "),
    "a drip of chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a drip of a header": drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "a drip of headers": drip(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "interim answers for ever": interim,
    "a flood": flood,
    "a length it does not keep": raw(HEAD % 10**15 + b"{"),
    "a negative length": raw(b"HTTP/1.0 200 OK\r\nContent-Length: -5\r\n\r\nhello"),
    "nothing": raw(b""),
    "not HTTP": raw(b"\x15\x03\x01\x00\x02\r\n\r\n"),
    "a chunk of no size": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "a chunk of a negative size": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n"),
    "a chunk to the end of the connection": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b" "),
    "a page": lambda h: send(h, "<html>sign in</html>", Content_Type="text/html"),
    "not UTF-8": lambda h: send(h, b"\xff\xfe\x00{"),
    "deep": lambda h: send(h, b"[" * 500_000),
    "a number of a million digits": lambda h: send(h, b"1" * 1_000_000),
    "compressed": lambda h: send(h, b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
    "null": lambda h: send(h, b"null"),
    "a list": lambda h: send(h, b"[]"),
    "a number": lambda h: send(h, b"7"),
    "a redirect to another host": lambda h: send(h, "", 302, Location="http://192.0.2.1/"),
    "a redirect to itself": lambda h: send(h, "", 307, Location=h.path),
    "an error that drips": drip(b"HTTP/1.0 500 Oops\r\nContent-Length: 5000\r\n\r\n", b" "),
}
EVERYWHERE = ("silence", "a drip of the body", "a flood", "a page", "not UTF-8", "deep", "a redirect to another host")


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        *(pytest.param("/v1/completions", answer, id=name) for name, answer in TRANSPORT.items()),
        *(pytest.param("/v1/models", TRANSPORT[name], id=f"models: {name}") for name in EVERYWHERE),
        *(pytest.param("/v1/load_lora_adapter", TRANSPORT[name], id=f"weights: {name}") for name in EVERYWHERE),
    ],
)
def test_no_answer_hangs_the_run_or_is_believed_and_the_server_is_named(connect, hostile, path, answer):
    hostile.instead = {path: answer}
    started = time.monotonic()
    with pytest.raises(RolloutError, match="server"):
        engine = connect(retries=0, timeout=LIMIT)
        if path == "/v1/load_lora_adapter":
            engine.sync()
        engine.generate([[5]])
    assert time.monotonic() - started < SOON


def choice(**changes) -> dict:
    right = {"token_ids": [7, STOP], "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}
    return {**right, **changes}


CHOICES = {
    "no choices": {},
    "choices of another type": {"choices": "ab"},
    "an empty list": {"choices": []},
    "a choice of another type": {"choices": ["ab"]},
    "ids as text": {"choices": [choice(token_ids="7 2")]},
    "ids in a list": {"choices": [choice(token_ids=[[7], [2]])]},
    "an id that is true": {"choices": [choice(token_ids=[True, STOP])]},
    "an id of a fraction": {"choices": [choice(token_ids=[7.5, STOP])]},
    "an id outside": {"choices": [choice(token_ids=[300, STOP])]},
    "a negative id": {"choices": [choice(token_ids=[-1, STOP])]},
    "too many": {"choices": [choice(token_ids=[7] * 9, logprobs={"token_logprobs": [-1] * 9}, finish_reason="length")]},
    "an end in the middle": {"choices": [choice(token_ids=[STOP, STOP])]},
    "no ids": {"choices": [choice(token_ids=None)]},
    "log-probs as text": {"choices": [choice(logprobs="low")]},
    "log-probs without values": {"choices": [choice(logprobs={})]},
    "null log-probs": {"choices": [choice(logprobs={"token_logprobs": [None, None]})]},
    "log-probs above 0": {"choices": [choice(logprobs={"token_logprobs": [3.0, -0.25]})]},
    "log-probs of true": {"choices": [choice(logprobs={"token_logprobs": [True, False]})]},
    "an infinite log-prob": '{"choices": [{"token_ids": [7, 2], "logprobs": {"token_logprobs": [-1e999, -0.5]}, '
    '"finish_reason": "stop"}]}',
    "NaN": {"choices": [choice(logprobs={"token_logprobs": [float("nan"), -0.5]})]},
    "an end of another type": {"choices": [choice(finish_reason=["stop"])]},
    "an end without a name": {"choices": [{"token_ids": [7, STOP], "logprobs": {"token_logprobs": [-0.5, -0.25]}}]},
    "cut off early": {"choices": [choice(finish_reason="length")]},
}


@pytest.mark.parametrize("answer", CHOICES.values(), ids=CHOICES)
def test_no_completion_that_breaks_a_rule_is_trained_on(connect, hostile, answer):
    engine = connect(retries=1)
    hostile.instead = {"/v1/completions": lambda handler: send(handler, answer)}
    with pytest.raises(RolloutError):
        engine.generate([[5]])
    hostile.instead = {}
    assert engine.generate([[5]])[0].response_ids == [7, STOP], "the same engine, once the server has come to itself"


MODELS = {
    "no models": {"data": []},
    "models of another type": {"data": {"0": "base"}},
    "a model without an id": {"data": [{"max_model_len": 32}]},
    "an id that is no text": {"data": [{"id": 7, "max_model_len": 32}]},
    "an endless id": {"data": [{"id": "x" * 100_000, "max_model_len": 32}]},
    "a context as text": {"data": [{"id": "base", "max_model_len": "32"}]},
    "a context below 0": {"data": [{"id": "base", "max_model_len": -32}]},
    "a context of NaN": {"data": [{"id": "base", "max_model_len": float("nan")}]},
}


@pytest.mark.parametrize("answer", MODELS.values(), ids=MODELS)
def test_a_server_that_does_not_say_what_it_serves_is_asked_again_and_refused(connect, hostile, answer):
    asked = []
    hostile.instead = {"/v1/models": lambda handler: (asked.append(handler.path), send(handler, answer))}
    with pytest.raises(RolloutError, match="no vLLM server answers at vllm_server_base_url"):
        connect(retries=2)
    assert asked == ["/v1/models"] * 3


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/load_lora_adapter", ""),
        ("/v1/load_lora_adapter", "Success: LoRA adapter 'another' added successfully."),
        ("/v1/load_lora_adapter", {"error": "no"}),
        ("/collective_rpc", ""),
        ("/collective_rpc", {"results": []}),
        ("/collective_rpc", {"results": "done"}),
        ("/reset_prefix_cache", {"success": False}),
        ("/reset_prefix_cache", "<html></html>"),
    ],
)
def test_weights_that_the_server_does_not_confirm_did_not_reach_it(connect, hostile, path, answer):
    engine = connect(retries=1, merged="lora" not in path)
    hostile.instead = {path: lambda handler: send(handler, answer)}
    with pytest.raises(
        RolloutError, match=r"did not reach the vLLM server at .* in 2 tries: .*it (does not say|still)"
    ):
        engine.sync()
    hostile.instead = {}
    engine.sync()


def test_an_answer_up_to_the_limit_is_read_and_a_longer_one_is_not(hostile):
    url = f"http://127.0.0.1:{hostile.server_port}/text"
    for length, fits in ((1000, True), (1001, False)):
        hostile.instead = {"/text": lambda handler, length=length: send(handler, "x" * length)}
        if fits:
            assert Connections().ask(url, timeout=SOON, limit=1000) == "x" * 1000
        else:
            with pytest.raises(ConnectionError, match="longer than 1,000 bytes"):
                Connections().ask(url, timeout=SOON, limit=1000)


def test_a_redirect_is_named_and_what_was_sent_goes_nowhere_else(hostile):
    url = f"http://127.0.0.1:{hostile.server_port}"
    hostile.instead = {"/a": lambda handler: send(handler, "", 301, Location="/b")}
    with pytest.raises(Refused, match="redirects to '/b', which is not followed"):
        Connections().ask(f"{url}/a", {"prompt": [5]}, timeout=SOON, limit=1000)
    assert [path for path, _ in hostile.seen] == ["/a"]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,{}"])
def test_a_url_that_is_not_of_a_server_is_not_read(url):
    with pytest.raises(OSError, match="unknown url type"):
        Connections().ask(url, timeout=SOON, limit=1000)
