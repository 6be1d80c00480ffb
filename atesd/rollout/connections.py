"""HTTP requests that another thread can abort.

urllib has only a timeout. A rollout may take half an hour, and an error or interrupt in the trainer must not wait for
it. A server stops generating when its connection is closed.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.request
import weakref
from typing import Any


class Connections:
    """Opens requests until `cut`, which aborts running ones. These fail with an OSError or HTTPException, as if the
    server had stopped."""

    def __init__(self) -> None:
        self.is_cut = threading.Event()
        self.lock = threading.Lock()
        self.sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        kinds = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
        self.opener = urllib.request.build_opener(*(self.noting(kind) for kind in kinds))

    def noting(self, handler: type[urllib.request.AbstractHTTPHandler]) -> Any:
        """Returns a `handler` that records each socket here as soon as it is connected."""
        connections = self

        class Noting(handler):  # type: ignore[misc, valid-type]
            def do_open(self, http_class: type[http.client.HTTPConnection], request: Any, **options: Any) -> Any:
                class Connection(http_class):  # type: ignore[misc, valid-type]
                    def connect(self) -> None:
                        super().connect()
                        connections.note(self)

                return super().do_open(Connection, request, **options)

        return Noting

    def note(self, connection: http.client.HTTPConnection) -> None:
        with self.lock:
            self.sockets.add(connection.sock)
            if self.is_cut.is_set():
                connection.close()
                raise ConnectionAbortedError("the connections to this server are closed")

    def open(self, request: urllib.request.Request, timeout: float) -> Any:
        """As `urllib.request.urlopen`."""
        return self.opener.open(request, timeout=timeout)

    def cut(self) -> None:
        """Aborts all requests, and refuses later ones."""
        with self.lock:
            self.is_cut.set()
            for each in self.sockets:
                with contextlib.suppress(OSError):  # already disconnected
                    each.shutdown(socket.SHUT_RDWR)
