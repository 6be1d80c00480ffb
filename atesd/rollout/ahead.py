"""Generates the next batch's rollouts while the current batch trains. They come from the student of one update ago.

A second thread calls the engine, which has its own copy of the student's weights. Every other call of the engine waits
until the batch is complete. A checkpoint also waits, and saves the batch, so a resumed run trains on the same
responses. A failed batch is not saved. After a resume it is generated from the saved student and is not stale.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

from atesd.rollout.engine import Rollout, RolloutEngine, Sampling


class AheadEngine:
    """Wraps `engine`, so that it can generate the next batch in advance.

    Args:
        engine: samples from a copy of the student's weights, taken in `sync`. An engine that reads the trained weights
            themselves would sample in the middle of an update.
    """

    def __init__(self, engine: RolloutEngine):
        self.engine = engine
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self.coming: tuple[list[list[int]], Future[list[Rollout]]] | None = None

    def begin(self, prompts: list[list[int]]) -> None:
        """Starts to generate for the prompts of the next `generate`, with the weights of the last `sync`."""
        self.wait()
        self.coming = prompts, self.thread.submit(self.engine.generate, prompts)

    def wait(self) -> None:
        """Waits until the batch is complete. Its errors are raised by the `generate` that returns the batch."""
        if self.coming is not None:
            wait([self.coming[1]])

    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]:
        """Returns the batch that `begin` started, with staleness 1. Without one, calls the engine."""
        self.wait()
        if sampling is not None or self.coming is None:
            return self.engine.generate(prompts, sampling)
        (announced, batch), self.coming = self.coming, None
        rollouts = batch.result()
        if announced != prompts:
            raise AssertionError("the rollouts generated ahead answer other prompts than those of this step: a bug.")
        return [replace(rollout, staleness=1) for rollout in rollouts]

    def sync(self) -> None:
        self.wait()
        self.engine.sync()

    def release(self) -> None:
        self.wait()
        self.engine.release()

    def close(self) -> None:
        """Closes the engine, which aborts a running batch, so that the thread does not delay the exit."""
        self.engine.close()
        self.thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        done = self.coming is not None and self.coming[1].exception() is None
        ahead = [asdict(rollout) for rollout in self.coming[1].result()] if done else None
        return {"engine": self.engine.state_dict(), "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait()  # a running batch would count its responses afterwards
        self.engine.load_state_dict(state["engine"])
        self.coming = None
        if state["ahead"] is not None:
            batch: Future[list[Rollout]] = Future()
            batch.set_result([Rollout(**rollout) for rollout in state["ahead"]])
            self.coming = [rollout.prompt_ids for rollout in batch.result()], batch
