"""Functions run on several gloo processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch


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
