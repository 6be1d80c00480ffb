"""HTTP requests with a deadline and a size limit for the whole answer, which another thread can abort.

urllib's timeout begins again with every byte. A rollout may take half an hour, and an error or interrupt in the trainer
must not wait for it. A server stops generating when its connection is closed. Redirects are not followed: what a run
sends and believes is between it and the server that its settings name.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import urllib.request
import weakref
from typing import Any

from atesd.errors import AtesdError


class Refused(AtesdError, OSError):
    """The server answered, with another status than 200."""

    def __init__(self, status: int, text: str):
        super().__init__(f"{status} {http.client.responses.get(status, '')}: {text[:500]}")
        self.status, self.text = status, text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.text)


class Request(urllib.request.Request):
    """A request that knows its sockets, so that it can be aborted."""

    def __init__(self, url: str, body: Any):
        super().__init__(url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"})
        self.sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.is_late = threading.Event()


class BoundedResponse(http.client.HTTPResponse):
    """Refuses a chunk of a negative size, which http.client would read to the end of the connection, past any limit."""

    def _read_next_chunk_size(self) -> int:
        size = int(super()._read_next_chunk_size())  # type: ignore[misc]
        if size < 0:
            raise http.client.HTTPException(f"a chunk of {size} bytes")
        return size


class Connections:
    """Sends requests until `cut` aborts them: they fail with an OSError, as if the server had stopped."""

    def __init__(self) -> None:
        self.is_cut = threading.Event()
        self.lock = threading.Lock()
        self.requests: weakref.WeakSet[Request] = weakref.WeakSet()
        self.opener = urllib.request.OpenerDirector()  # build_opener's would follow redirects and read files
        kinds = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
        for handler in (urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), *map(self.noting, kinds)):
            self.opener.add_handler(handler)

    def noting(self, handler: type[urllib.request.AbstractHTTPHandler]) -> Any:
        """Returns a `handler` that records each socket here as soon as it is connected."""
        connections = self

        class Noting(handler):  # type: ignore[misc, valid-type]
            def do_open(self, http_class: type[http.client.HTTPConnection], request: Request, **options: Any) -> Any:
                class Connection(http_class):  # type: ignore[misc, valid-type]
                    response_class = BoundedResponse

                    def connect(self) -> None:
                        super().connect()
                        connections.note(request, self)

                return super().do_open(Connection, request, **options)

        return Noting()

    def note(self, request: Request, connection: http.client.HTTPConnection) -> None:
        with self.lock:
            request.sockets.add(connection.sock)
            if self.is_cut.is_set() or request.is_late.is_set():
                connection.close()
                raise ConnectionAbortedError("the connections to this server are closed")

    def ask(self, url: str, body: Any = None, *, timeout: float, limit: int) -> Any:
        """Sends a GET, or a POST if there is a body. Returns the answer as JSON, or as text if it is not JSON.

        Args:
            timeout: seconds after which the whole answer must have come.
            limit: most bytes of the answer.

        Raises:
            Refused: the answer has another status than 200.
            TimeoutError: no whole answer in time.
            ConnectionError: the answer is too long, incomplete or not HTTP, or the connection failed.
        """
        request = Request(url, body)
        try:
            status, data, missing, location = self.receive(request, timeout, limit)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of http.client's own parsing
            if request.is_late.is_set():
                raise TimeoutError(f"no whole answer from the server at {url} in {timeout:g} s") from error
            if isinstance(error, http.client.HTTPException | ValueError):
                raise ConnectionError(f"the server's answer at {url} is incomplete or not HTTP: {error!r}") from error
            raise ConnectionError(f"no answer from the server at {url}: {error}") from error
        if len(data) > limit:
            raise ConnectionError(f"the server's answer at {url} is longer than {limit:,} bytes")
        if missing:
            raise ConnectionError(f"the server's answer at {url} is incomplete: {missing:,} bytes of it are missing")
        if status != http.client.OK:
            raise Refused(status, data.decode(errors="replace") if location is None else redirection(location))
        return parsed(data)

    def receive(self, request: Request, timeout: float, limit: int) -> tuple[int, bytes, int | None, str | None]:
        """Returns status, body up to one byte more than `limit`, number of bytes that did not come, and Location."""
        with self.lock:
            self.requests.add(request)
        watch = threading.Timer(timeout, self.expire, [request])
        watch.daemon = True
        watch.start()
        try:
            with self.opener.open(request, timeout=timeout) as response:
                data = response.read(limit + 1)
        finally:
            watch.cancel()
        if request.is_late.is_set():  # what was aborted can look like an answer that ends with its connection
            raise TimeoutError
        return response.status, data, response.length, response.headers.get("Location")

    def expire(self, request: Request) -> None:
        with self.lock:
            request.is_late.set()
            shut(request)

    def cut(self) -> None:
        """Aborts all requests, and refuses later ones."""
        with self.lock:
            self.is_cut.set()
            for request in self.requests:
                shut(request)


def shut(request: Request) -> None:
    for each in request.sockets:
        with contextlib.suppress(OSError):  # already disconnected
            socket.socket.shutdown(each, socket.SHUT_RDWR)  # TLS's own would take the object from the thread that reads


def redirection(location: str) -> str:
    where = repr(location[:200])
    return f"it redirects to {where}, which is not followed: name that address in the settings if it is yours"


def parsed(data: bytes) -> Any:
    """Returns an answer as JSON, or as text if it is not JSON: NaN and Infinity are not."""
    text = data.decode(errors="replace")
    try:
        return json.loads(text, parse_constant=not_json)
    except (ValueError, RecursionError):
        return text


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
