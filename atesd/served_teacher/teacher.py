"""The teacher that a run asks: top entries of its responses, and log-probabilities of references, from a server."""

from __future__ import annotations

import torch
from torch import Tensor

from atesd.errors import ModelError
from atesd.models.batching import PackedBatch
from atesd.models.teachers import FixedTeacher
from atesd.models.top_entries import TopEntries, concatenated, no_entries
from atesd.parallel.processes import Processes
from atesd.rollout.engine import RolloutError
from atesd.served_teacher.passages import Passage, passages_of
from atesd.served_teacher.server import TeacherServer
from atesd.terminal import progress


class ServedTeacher(FixedTeacher):
    """Scores responses by a server; see `teachers.AnyTeacher`.

    Each process asks for its own. Where one gets no answer, all raise RolloutError, so all make the same calls.

    Args:
        server: checked.
        processes: of the run.
    """

    kind = "vllm_server"
    remote = True
    shares_head = False
    head = None

    def __init__(self, server: TeacherServer, processes: Processes):
        self.server, self.processes = server, processes
        self.scored: dict[Passage, TopEntries] = {}

    def prepare(self, batch: PackedBatch) -> None:
        """Asks for the scores of a step's responses, all at once."""
        self.scored = self.ask(batch)

    def hidden(self, batch: PackedBatch) -> TopEntries:
        """Returns the top entries at the response tokens of `batch`: those that are prepared, or else asked for."""
        passages = passages_of(batch)
        scored = self.scored if self.scored.keys() >= set(passages) else self.ask(batch)
        return self.joined(scored, passages, batch.targets.device)

    def target_logprobs(self, batch: PackedBatch, chunk_bytes: int | None = None) -> Tensor:
        """Returns the log-probability of each response token of `batch`, `(N,)`: a request for each sequence."""
        scored = self.ask(batch)
        return self.joined(scored, passages_of(batch), batch.targets.device).of_targets

    def joined(self, scored: dict[Passage, TopEntries], passages: list[Passage], device: torch.device) -> TopEntries:
        parts = [scored[passage] for passage in passages]
        return concatenated(parts, self.server.known).to(device)

    def ask(self, batch: PackedBatch) -> dict[Passage, TopEntries]:
        """Returns the scores of the sequences of `batch`, of equal ones once.

        Raises:
            ModelError: a response holds a token that the tokenizer does not know.
            RolloutError: on every process, if the server gave no scores to one.
        """
        largest = max(batch.response_ids, default=0)
        if largest >= self.server.known:
            raise ModelError(
                f"a response holds token {largest}, and teacher and student share {self.server.known} entries: the "
                "rollout engine must sample tokens of the tokenizer only"
            )
        passages = list(dict.fromkeys(passages_of(batch)))
        asked = [passage for passage in passages if passage.places]
        failure: RolloutError | None = None
        scores: list[TopEntries] = []
        try:
            with progress("teacher's scores", len(asked), hidden=not self.processes.is_main):
                scores = self.server.score(asked) if asked else []
        except RolloutError as error:
            failure = error
        if self.processes.any(failure is not None):
            raise failure or RolloutError("the teacher's server failed another process")
        nothing = no_entries(self.server.known)
        return {**dict.fromkeys(passages, nothing), **dict(zip(asked, scores, strict=True))}
