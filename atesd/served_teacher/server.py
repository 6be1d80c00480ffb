"""Asks a vLLM server that holds the teacher: which model it has, whether it fits, and its scores of passages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from atesd.config import ATESDConfig
from atesd.errors import ModelError
from atesd.models.loading import load_model_config
from atesd.models.top_entries import TopEntries, without_padding_rows
from atesd.models.vocabulary import num_entries
from atesd.parallel.processes import Processes
from atesd.rollout.answer_rules import at, broken_rule, shown
from atesd.rollout.connections import Connections, Refused
from atesd.rollout.engine import RolloutError
from atesd.rollout.requests import STOPPED, usable_answers
from atesd.rollout.server_client import START_SECONDS, ServerClient, is_passing, reason
from atesd.served_teacher.passages import Passage
from atesd.served_teacher.score_rules import SCORE_RULES, AskedScores
from atesd.terminal import advance, show

# Most bytes of an answer, and more for each log-probability: its id, number, rank and text.
BYTES, BYTES_AN_ENTRY = 1 << 20, 1 << 9


class TeacherServer(ServerClient):
    """Sends passages to the teacher's server.

    Args:
        base_url: URL of the server.
        top_k: number of most likely tokens to ask for.
        known: entries that student and teacher share.
        retries: number of times to ask again for a score that failed.
        timeout: seconds after which a request fails.

    Attributes:
        model: name under which the server knows the teacher; set by `check`.
        context_length: longest passage in tokens; None if the server does not say.
    """

    setting = "teacher_base_url"
    pause = 5.0  # seconds before the first retry; the second waits twice as long

    def __init__(self, base_url: str, *, top_k: int, known: int, retries: int = 2, timeout: float = 1800.0):
        self.url, self.top_k, self.known = base_url.rstrip("/"), top_k, known
        self.retries, self.timeout, self.answer_limit = retries, timeout, BYTES
        self.connections, self.stopped = Connections(), threading.Event()
        self.model, self.context_length = "", None

    def check(self, tokenizer: Any = None) -> tuple[str, int | None]:
        """Asks for the model's name and context, for `top_k` log-probabilities, and for the text of token ids.

        Args:
            tokenizer: the student's, to compare; None: its vocabulary is known to be the teacher's.

        Returns:
            `model` and `context_length`.

        Raises:
            RolloutError: no server answers, or it does not give so many log-probabilities.
            ModelError: its tokenizer gives an id another text.
        """
        served = self.served_model()
        self.model = served["id"]
        if served.get("max_model_len") is not None:
            self.context_length = served["max_model_len"] - 1  # it has to generate a token
        self.score([Passage((0, 0), (1,))])
        if tokenizer is not None:
            self.check_vocabulary(tokenizer)
        return self.model, self.context_length

    def check_vocabulary(self, tokenizer: Any) -> None:
        """Raises ModelError unless the server's text of each token id is the student's."""
        ids = sorted(tokenizer.get_vocab().values())
        try:
            if self.text_of(ids) == tokenizer.decode(ids):
                return
            while len(ids) > 1:
                half = ids[: len(ids) // 2]
                ids = half if self.text_of(half) != tokenizer.decode(half) else ids[len(ids) // 2 :]
            theirs = self.text_of(ids)
        except OSError as error:
            show(
                f"it was not checked whether the teacher at {self.url} has the student's vocabulary: its /detokenize "
                f"gave no text ({reason(error)}). teacher_model_name_or_path would compare a tokenizer"
            )
            return
        raise ModelError(
            f"the server at teacher_base_url {self.url!r} holds {shown(self.model)}, whose tokenizer differs from the "
            f"student's: token {ids[0]} is {shown(theirs)} of the teacher and {shown(tokenizer.decode(ids))} of the "
            "student. Student and teacher are compared entry by entry: serve a model of the student's family. If it is "
            "one, set teacher_model_name_or_path: its tokenizer is then compared in place of these texts"
        )

    def text_of(self, ids: list[int]) -> str:
        """Returns the server's text of token ids. Raises OSError if it gives none."""
        body, limit = {"model": self.model, "tokens": ids}, BYTES + BYTES_AN_ENTRY * len(ids)
        answer = self.ask("/detokenize", body, min(START_SECONDS, self.timeout), limit)
        text = at(answer, "prompt")
        if not isinstance(text, str):
            raise ConnectionError(f"no text but {shown(answer)}")
        return text

    def score(self, passages: Sequence[Passage]) -> list[TopEntries]:
        """Returns the `top_k` most likely tokens, and the scored one, at the places of each passage. All concurrently.

        Raises:
            RolloutError: a passage has no usable scores after all tries, or asking again is no use.
        """

        def ask(left: list[int]) -> list[TopEntries | Exception]:
            return self.all_at_once(self.score_one, [passages[i] for i in left], note=counted)

        waits = (self.pause * attempt for attempt in range(1 + self.retries))
        return usable_answers(len(passages), ask, self.what_is_wrong, waits, self.stopped, "teacher scores")

    def what_is_wrong(self, number: int, answer: TopEntries | Exception) -> str | None:
        if isinstance(answer, RolloutError):
            raise answer
        if not isinstance(answer, Exception):
            return None
        # vLLM 0.32 gives the LM head's part of adapters one row for each request, and a prompt's scores need more.
        advice = ""
        if "EngineCore" in str(answer):
            advice = (
                ". If it runs with --enable-lora, start it without: with it vLLM's CPU build cannot score two prompts "
            )
            advice += "at once"
        return f"the server at {self.url}: {reason(answer)}{advice}"

    def score_one(self, passage: Passage) -> TopEntries | Exception:
        if self.stopped.is_set():  # set while this request waited in the pool
            return RolloutError(STOPPED)
        body = {
            "model": self.model,
            "prompt": list(passage.ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "return_token_ids": True,
        }
        try:
            limit = BYTES + BYTES_AN_ENTRY * len(passage.ids) * (self.top_k + 1)
            answer = self.ask("/v1/completions", body, limit=limit)
        except Refused as error:
            return ConnectionError(str(error)) if is_passing(error) else self.refusal(error)
        except OSError as error:
            return error
        choice = at(answer, "choices", 0)
        if not isinstance(choice, dict):
            return ConnectionError(f"no completion but {shown(answer)}")
        if choice.get("prompt_logprobs") is None:
            return RolloutError(
                f"the server at teacher_base_url {self.url!r} does not return prompt_logprobs, which are the teacher's "
                "scores: use vLLM's (`vllm serve`)"
            )
        if problem := broken_rule(SCORE_RULES, choice, AskedScores(passage, self.top_k, self.known)):
            return ConnectionError(problem)
        return top_entries(choice["prompt_logprobs"], passage, self.known)

    def refusal(self, error: Refused) -> RolloutError:
        advice = ""
        if "logprobs" in error.text:
            advice = f"\nStart it with --max-logprobs {self.top_k} or more, or lower teacher_top_k ({self.top_k})"
        return RolloutError(f"the server at teacher_base_url {self.url!r} refused to score a response: {error}{advice}")


def top_entries(prompt_logprobs: list[dict[str, Any]], passage: Passage, known: int) -> TopEntries:
    """Builds the entries of a passage from scores that break no rule."""
    rows = [prompt_logprobs[place] for place in passage.places]
    width = max(map(len, rows))
    ids = [[int(key) for key in row] + [-1] * (width - len(row)) for row in rows]
    logprobs = [[value["logprob"] for value in row.values()] + [0.0] * (width - len(row)) for row in rows]
    own = [row[str(passage.ids[place])]["logprob"] for row, place in zip(rows, passage.places, strict=True)]
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (logprobs, own))
    return without_padding_rows(torch.tensor(ids), *numbers, known)


def counted(answer: TopEntries | Exception) -> TopEntries | Exception:
    advance(int(isinstance(answer, TopEntries)))
    return answer


def make_teacher_server(config: ATESDConfig, tokenizer: Any, processes: Processes) -> TeacherServer | None:
    """Returns the checked server of a run whose teacher is behind one; None for another teacher.

    Raises:
        RolloutError, ModelError: on every process, as `TeacherServer.check`, which the main one calls.
    """
    if config.teacher != "vllm_server":
        return None
    rows = load_model_config(config).get_text_config().vocab_size
    server = TeacherServer(
        config.teacher_base_url or "",
        top_k=config.teacher_top_k,
        known=min(num_entries(tokenizer), rows),
        retries=config.rollout_retries,
        timeout=config.rollout_timeout,
    )
    compared = config.teacher_model_name_or_path is not None
    server.model, server.context_length = processes.broadcast_from_main(server.check, None if compared else tokenizer)
    return server
