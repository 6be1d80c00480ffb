"""Rollouts of the next batch, generated while the current one trains: sampled from the student of one update ago.

Separate from the engines because none of them knows of it: a second thread asks the engine, which holds its own copy of
the student's weights, and whatever else it is asked for waits until that batch is there. A checkpoint waits for it too
and saves it, so a resumed run trains on the same responses. A batch that failed is not saved: after a resume it is
generated from the student as it was saved, and is not stale.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

from atesd.rollout.engine import Rollout, RolloutEngine, Sampling


class AheadEngine:
    """`engine`, which can be told what it will be asked for next.

    Args:
        engine: samples from a copy of the student's weights, taken at its `sync`; one that reads the weights being
            trained would sample from half of an update.
    """

    def __init__(self, engine: RolloutEngine):
        self.engine = engine
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self.coming: tuple[list[list[int]], Future[list[Rollout]]] | None = None

    def begin(self, prompts: list[list[int]]) -> None:
        """Start on the prompts of the next `generate`, from the weights of the last `sync`."""
        self.wait()
        self.coming = prompts, self.thread.submit(self.engine.generate, prompts)

    def wait(self) -> None:
        """Until nothing is being generated; what went wrong is told by the `generate` that asks for the batch."""
        if self.coming is not None:
            wait([self.coming[1]])

    def generate(self, prompts: list[list[int]], sampling: Sampling | None = None) -> list[Rollout]:
        """What `begin` was told to generate, marked as one update old; without that, the engine's own."""
        self.wait()
        if sampling is not None or self.coming is None:
            return self.engine.generate(prompts, sampling)
        (announced, batch), self.coming = self.coming, None
        rollouts = batch.result()
        if announced != prompts:
            raise AssertionError("the rollouts generated ahead answer other prompts than those of this step.")
        return [replace(rollout, staleness=1) for rollout in rollouts]

    def sync(self) -> None:
        self.wait()
        self.engine.sync()

    def release(self) -> None:
        self.wait()
        self.engine.release()

    def close(self) -> None:
        """Nobody will ask for what is under way: the engine ends it, so that its thread is not waited for at exit."""
        self.engine.close()
        self.thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        done = self.coming is not None and self.coming[1].exception() is None
        ahead = [asdict(rollout) for rollout in self.coming[1].result()] if done else None
        return {"engine": self.engine.state_dict(), "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        self.coming = None
        if state["ahead"] is not None:
            batch: Future[list[Rollout]] = Future()
            batch.set_result([Rollout(**rollout) for rollout in state["ahead"]])
            self.coming = [rollout.prompt_ids for rollout in batch.result()], batch
