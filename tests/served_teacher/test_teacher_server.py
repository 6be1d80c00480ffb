"""A teacher's server that hangs, lies or breaks off: no score of it is believed, and each error names the server."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from atesd.errors import ModelError
from atesd.models.batching import pack
from atesd.models.teachers import Teacher
from atesd.parallel.processes import Processes
from atesd.rollout import RolloutError
from atesd.served_teacher.passages import Passage, passages_of
from atesd.served_teacher.server import TeacherServer
from atesd.served_teacher.teacher import ServedTeacher
from tests.http_answers import send

IDS = (5, 6, 7, 8)
PASSAGE = Passage(IDS, (2, 3))
SCORE = {"7": {"logprob": -0.5}, "9": {"logprob": -1.5}}
LAST = {"9": {"logprob": -0.25}, "3": {"logprob": -3.0}, "8": {"logprob": -5.0}}
SOON = 60.0  # seconds, of a busy machine, in which an answer is given up; those that hang take longer


def choice(**changes) -> dict:
    return {"prompt_logprobs": [None, {"6": {"logprob": -1.0}}, SCORE, LAST], **changes}


def with_last(entry: object) -> dict:
    return choice(prompt_logprobs=[None, SCORE, SCORE, entry])


def listed(**logprobs: object) -> dict:
    return with_last({name.removeprefix("t"): {"logprob": value} for name, value in logprobs.items()})


@pytest.fixture
def teacher(server, monkeypatch):
    """The client of the stand-in, which answers every passage with `server.choice`."""
    monkeypatch.setattr(TeacherServer, "pause", 0.0)
    server.choice = choice()
    server.instead = {"/v1/completions": lambda handler: send(handler, {"choices": [handler.server.choice]})}
    client = TeacherServer(f"http://127.0.0.1:{server.server_port}", top_k=2, known=300, timeout=1.0, retries=0)
    client.model = "base"
    return client


def test_scores_are_those_of_the_places_padded_to_the_same_number(teacher, server):
    (found,) = teacher.score([PASSAGE])
    assert found.ids.tolist() == [[7, 9, -1], [9, 3, 8]] and found.known == 300
    torch.testing.assert_close(found.logprobs[1], torch.tensor([-0.25, -3.0, -5.0], dtype=torch.float64))
    torch.testing.assert_close(found.of_targets, torch.tensor([-0.5, -5.0], dtype=torch.float64))
    ((path, body),) = server.seen
    assert path == "/v1/completions"
    assert (body["prompt"], body["prompt_logprobs"], body["max_tokens"], body["model"]) == (list(IDS), 2, 1, "base")


HOSTILE = {
    "no scores": ({}, "does not return prompt_logprobs"),
    "scores of a word": (choice(prompt_logprobs="many"), "prompt_logprobs that are no list: 'many'"),
    "scores of fewer tokens": (choice(prompt_logprobs=[None, SCORE]), "prompt_logprobs of 2 tokens"),
    "scores of others": (choice(prompt_token_ids=[1, 2, 3, 4]), "scores of other tokens than were sent"),
    "null": (with_last(None), "log-probabilities are no object: None"),
    "a list": (with_last([1, 2]), r"log-probabilities are no object: \[1, 2\]"),
    "too few": (listed(t8=-1.0), "a token with 1 log-probabilities"),
    "too many": (listed(t8=-5, t9=-5, t10=-5, t11=-5), "a token with 4 log-probabilities"),
    "none": (with_last({}), "a token with 0 log-probabilities"),
    "a word as token": (listed(t8=-1.0, tx=-2.0), "log-probability of 'x', which is no token id"),
    "a negative token": (with_last({"8": {"logprob": -1}, "-1": {"logprob": -1}}), "'-1', which is no token id"),
    "a token twice": (with_last({"8": {"logprob": -1}, "08": {"logprob": -1}}), "'08', which is no token id"),
    "another script's digits": (with_last({"8": {"logprob": -1}, "٣": {"logprob": -1}}), "which is no token id"),
    "a token of a million digits": (with_last({"8": {"logprob": -1}, "9" * 10**6: {"logprob": -1}}), "is no token id"),
    "a token beyond the vocabulary": (listed(t8=-1.0, t99999=-2.0), "outside the vocabulary: '99999'"),
    "text": (listed(t8=-1.0, t9="-2"), "a log-probability that is none: {'logprob': '-2'}"),
    "true": (listed(t8=-1.0, t9=True), "a log-probability that is none"),
    "above 0": (listed(t8=0.5, t9=-2.0), "a log-probability that is none: {'logprob': 0.5}"),
    "too low": (listed(t8=-1.0, t9=-1e300), "a log-probability that is none"),
    "no number at all": (with_last({"8": {"logprob": -1}, "9": -2.0}), "a log-probability that is none: -2.0"),
    "nothing of the token": (listed(t9=-1.0, t3=-2.0), "no log-probability of the scored token 8"),
    "logits": (listed(t8=-0.1, t9=-0.1), "probabilities sum to 1.8"),
    "all beyond the tokenizer": (listed(t8=-5.0, t301=-0.01), "0.99.* on ids that the student's tokenizer does not"),
}


@pytest.mark.parametrize(("answer", "named"), HOSTILE.values(), ids=HOSTILE)
def test_scores_that_cannot_be_true_are_refused_by_name(teacher, server, answer, named):
    server.choice = answer
    with pytest.raises(RolloutError, match=named) as caught:
        teacher.score([PASSAGE])
    assert teacher.url in str(caught.value) and len(str(caught.value)) < 1000


TRANSPORT = {
    "silence": lambda handler: handler.server.over.wait(240),
    "a flood": lambda handler: [handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + b" " * (1 << 20)) for _ in range(99)],
    "infinity": lambda handler: send(handler, json.dumps({"choices": [listed(t8=float("-inf"), t9=-1.0)]})),
    "a page": lambda handler: send(handler, "<html>sign in</html>"),
    "no choices": lambda handler: send(handler, {"choices": []}),
    "a redirect": lambda handler: send(handler, "", 302, Location="http://192.0.2.1/"),
    "nothing": lambda handler: handler.wfile.write(b""),
    "an error": lambda handler: send(handler, {"error": "out of memory"}, 500),
}


@pytest.mark.parametrize("answer", TRANSPORT.values(), ids=TRANSPORT)
def test_no_answer_hangs_the_run_or_is_believed(teacher, server, answer):
    server.over, server.instead = threading.Event(), {"/v1/completions": answer}
    started = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=teacher.url):
            teacher.score([PASSAGE])
    finally:
        server.over.set()
    assert time.monotonic() - started < SOON


def test_a_server_that_stops_as_it_does_with_lora_is_named_though_it_only_refuses_later(teacher, server):
    died, asked = {"error": {"message": "EngineCore encountered an issue.", "code": 500}}, []
    teacher.retries = 1

    def answer(handler):
        asked.append(True)
        send(handler, died if len(asked) == 1 else {"error": "gone"}, 500 if len(asked) == 1 else 503)

    server.instead = {"/v1/completions": answer}
    with pytest.raises(RolloutError, match=r"EngineCore.*start it without: with it vLLM's CPU build"):
        teacher.score([PASSAGE])


def test_a_passage_that_failed_is_asked_for_again_alone(teacher, server):
    teacher.retries, failed = 1, []

    def answer(handler):
        body = handler.body
        if body["prompt"] == [5, 6, 7, 8] and not failed:
            failed.append(True)
            return send(handler, {"error": "as scripted"}, 503)
        places = [None, *({str(i): {"logprob": -1.0}, "299": {"logprob": -1.0}} for i in body["prompt"][1:])]
        send(handler, {"choices": [{"prompt_logprobs": places}]})

    server.instead = {"/v1/completions": answer}
    first = teacher.score([PASSAGE])
    assert [body["prompt"] for _, body in server.seen] == [list(IDS), list(IDS)]
    second = teacher.score([Passage((5, 9), (1,)), Passage((5, 9, 9), (1, 2))])
    assert [len(found.ids) for found in (*first, *second)] == [2, 1, 2]


def test_a_server_that_is_stopped_answers_no_more(teacher):
    teacher.stop()
    with pytest.raises(RolloutError, match="stopped"):
        teacher.score([PASSAGE])


def test_rows_that_pad_the_head_take_no_probability_from_the_tokens(teacher, server):
    server.choice = listed(t8=-1.0, t9=-2.0, t301=-3.0)
    found = teacher.score([Passage(IDS, (3,))])[0]
    assert found.ids.tolist() == [[8, 9, -1]]
    known = torch.tensor([-1.0, -2.0], dtype=torch.float64) - (1 - torch.tensor(-3.0, dtype=torch.float64).exp()).log()
    torch.testing.assert_close(found.logprobs[0, :2], known)
    torch.testing.assert_close(found.of_targets, known[:1])


def test_passages_are_the_sequences_of_a_batch_and_the_tokens_of_it_that_count():
    batch = pack([[1, 2], [3], [4, 5]], [[6, 7, 8], [9], [10, 11]], "cpu", [[1, 0, 1], None, [0, 0]])
    assert passages_of(batch) == [
        Passage((1, 2, 6, 7, 8), (2, 4)), Passage((3, 9), (1,)), Passage((4, 5, 10, 11), ()),
    ]  # fmt: skip


def test_equal_sequences_are_asked_for_once_and_those_without_tokens_that_count_never(teacher, server):
    batch = pack([[5, 6]] * 3, [[7, 8]] * 3, "cpu", [None, None, [0, 0]])
    served = ServedTeacher(teacher, Processes())
    served.prepare(batch)
    found = served.hidden(batch)
    assert len(server.seen) == 1 and found.ids.shape == (4, 3)
    part = served.hidden(pack([[5, 6]], [[7, 8]], "cpu"))
    assert len(server.seen) == 1 and torch.equal(part.ids, found.ids[:2])
    torch.testing.assert_close(served.target_logprobs(batch), torch.tensor([-0.5, -5.0] * 2, dtype=torch.float64))
    assert served.hidden(pack([[5, 6]], [[7, 8]], "cpu", [[0, 0]])).ids.shape == (0, 1)


def test_a_token_that_only_the_students_head_has_is_refused_before_it_is_sent(teacher, server):
    with pytest.raises(ModelError, match="a response holds token 300, and teacher and student share 300 entries"):
        ServedTeacher(teacher, Processes()).prepare(pack([[5]], [[300]], "cpu"))
    assert server.seen == []


def test_where_the_server_fails_another_process_this_one_stops_too(teacher):
    class Two(Processes):
        def any(self, flag):
            return True

    with pytest.raises(RolloutError, match="failed another process"):
        ServedTeacher(teacher, Two()).prepare(pack([[5, 6]], [[7, 8]], "cpu"))


def test_a_checkpoint_of_another_teacher_is_refused(teacher):
    served = ServedTeacher(teacher, Processes())
    served.load_state_dict(served.state_dict())
    with pytest.raises(ValueError, match="was made with teacher='frozen', not 'vllm_server'"):
        served.load_state_dict({"kind": "frozen", "values": {}})
    assert isinstance(Teacher.remote, bool) and ServedTeacher.remote


@pytest.mark.parametrize(("models", "named"), [
    ({"data": []}, "a list of models without a first one"),
    ({"data": [{"id": 7}]}, "a model whose id is no name"),
    ({"data": [{"id": "m", "max_model_len": -1}]}, "max_model_len is no positive"),
], ids=["none", "a number", "a negative context"])  # fmt: skip
def test_a_list_of_models_that_cannot_be_true_is_refused_by_the_settings_name(teacher, server, models, named):
    server.instead["/v1/models"] = lambda handler: send(handler, models)
    with pytest.raises(RolloutError, match=f"no vLLM server answers at teacher_base_url .*{named}"):
        teacher.check()


@pytest.mark.parametrize("answer", [{"prompt": 7}, [], "text", {"prompt": None}])
def test_texts_that_are_none_are_no_proof_of_another_vocabulary(teacher, server, capfd, answer):
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 1}

        def decode(self, ids):
            return "".join("ab"[i] for i in ids)

    server.instead["/detokenize"] = lambda handler: send(handler, answer)
    teacher.check_vocabulary(Tokenizer())
    assert "it was not checked" in capfd.readouterr().out
    server.instead["/detokenize"] = lambda handler: send(handler, {"prompt": "x" * 10**5})
    with pytest.raises(ModelError, match=r"token 0 is 'xx.* of the teacher and 'a' of the student") as caught:
        teacher.check_vocabulary(Tokenizer())
    assert len(str(caught.value)) < 1000
