"""What every user of a vLLM server does: name its model, send many requests at once, abort them.

A server that generates rollouts and one that teaches are asked alike. What either may answer is in rules.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from atesd.rollout.answer_rules import MODEL_RULES, at, broken_rule
from atesd.rollout.connections import Connections, Refused
from atesd.rollout.engine import RolloutError

MAX_CONNECTIONS = 256
START_SECONDS = 30.0  # most seconds for the first request
BUSY = (408, 429, 502, 503, 504)


class ServerClient:
    """Sends requests to one server.

    Attributes:
        url: of the server, without a slash at its end.
        setting: that names this address, for messages.
        connections: through which requests go.
        answer_limit: most bytes of an answer.
        timeout: seconds after which a request fails.
        retries, pause: how often the first request is made again, and seconds before that.
        stopped: set where no answer is wanted any more.
    """

    url: str
    setting: str
    connections: Connections
    answer_limit: int
    timeout: float
    retries: int
    pause: float
    stopped: threading.Event

    def served_model(self) -> dict[str, Any]:
        """Returns the server's first model, its base model. Asked for again if the answer is not usable."""
        problem = ""
        for attempt in range(1 + self.retries):
            time.sleep(self.pause * attempt)
            try:
                served = at(self.ask("/v1/models", timeout=min(START_SECONDS, self.timeout)), "data", 0)
                problem = broken_rule(MODEL_RULES, served)
            except (OSError, ValueError) as error:  # ValueError: the URL is none
                problem = reason(error)
            if not problem:
                return served
        raise RolloutError(
            f"no vLLM server answers at {self.setting} {self.url!r} ({problem}): start one with `vllm serve`, "
            "wait until it says that it is ready, and try again."
        )

    def all_at_once(
        self, send: Callable[..., Any], *columns: Sequence[Any], note: Callable[[Any], Any] = lambda answer: answer
    ) -> list[Any]:
        """Returns `note(send(*row))` for each row of `columns`. `send` runs in threads. Ctrl-C aborts all requests."""
        with ThreadPoolExecutor(min(len(columns[0]), MAX_CONNECTIONS)) as pool:
            try:
                return [note(answer) for answer in pool.map(send, *columns)]
            except KeyboardInterrupt:  # leaving the pool would wait for every answer
                self.stop()
                raise

    def stop(self) -> None:
        """Aborts running requests, which raise a RolloutError, and refuses new ones."""
        self.stopped.set()
        self.connections.cut()

    def ask(
        self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None, limit: int | None = None
    ) -> Any:
        """As `Connections.ask`, with a path of this server."""
        limit = limit or self.answer_limit
        return self.connections.ask(self.url + path, body, timeout=timeout or self.timeout, limit=limit)


def is_passing(error: Refused) -> bool:
    """Whether a server that refused a request may answer it the next time."""
    return error.status in BUSY or error.status >= 500


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
