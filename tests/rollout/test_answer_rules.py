"""The rules for an engine's answers: whatever breaks one is found, and what is right breaks none."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.rollout.answer_rules import (
    COMPLETION_RULES,
    MODEL_RULES,
    WEIGHT_RULES,
    Asked,
    Completion,
    at,
    broken_rule,
)

STOP, VOCABULARY, LONGEST = 2, 300, 8
ASKED = Asked(LONGEST, VOCABULARY, frozenset([STOP]), logprobs=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TOKEN = st.integers(3, VOCABULARY - 1)
LOGPROB = st.floats(-9999, 0)


@st.composite
def right(draw) -> Completion:
    stopped = draw(st.booleans())
    count = draw(st.integers(0, LONGEST - 1)) if stopped else LONGEST
    ids = draw(st.lists(TOKEN, min_size=count, max_size=count)) + [STOP] * stopped
    logprobs = draw(st.lists(LOGPROB, min_size=len(ids), max_size=len(ids)))
    return Completion(ids, logprobs, "stop" if stopped else "length")


@given(right())
def test_a_right_answer_breaks_no_rule(completion):
    assert broken_rule(COMPLETION_RULES, completion, ASKED) is None


def usable(completion: Completion) -> bool:
    """The same claims in the plainest words, for values of any type."""
    ids, logprobs = completion.token_ids, completion.logprobs
    return (
        type(ids) is list
        and 0 < len(ids) <= LONGEST
        and all(type(t) is int and 0 <= t < VOCABULARY for t in ids)
        and STOP not in ids[:-1]
        and (completion.finish_reason, len(ids) == LONGEST, ids[-1] == STOP)
        in {("stop", False, True), ("stop", True, True), ("length", True, False), ("length", True, True)}
        and type(logprobs) is list
        and len(logprobs) == len(ids)
        and all(type(p) in (int, float) and -1e4 <= p <= 1e-4 for p in logprobs)
    )


@given(JSON | st.lists(JSON | TOKEN, max_size=LONGEST + 1), JSON | st.lists(JSON | LOGPROB, max_size=LONGEST + 1), JSON)
def test_no_answer_of_any_shape_raises_or_is_believed(ids, logprobs, reason):
    completion = Completion(ids, logprobs, reason)
    if not (isinstance(reason, str) and usable(completion)):
        assert broken_rule(COMPLETION_RULES, completion, ASKED)


@given(right(), st.data())
def test_one_wrong_value_in_a_right_answer_is_found(completion, data):
    where = data.draw(st.integers(0, len(completion.token_ids) - 1))
    field, values = data.draw(
        st.sampled_from(
            [
                ("token_ids", JSON.filter(lambda v: not (type(v) is int and 0 <= v < VOCABULARY))),
                ("logprobs", JSON.filter(lambda v: not (type(v) in (int, float) and -1e4 <= v <= 1e-4))),
            ]
        )
    )
    getattr(completion, field)[where] = data.draw(values)
    assert broken_rule(COMPLETION_RULES, completion, ASKED)


NAN = float("nan")
WRONG = {
    "no list": (Completion("7", [-1.0], "stop"), "no list: '7'"),
    "empty": (Completion([], [], "stop"), "empty response"),
    "too long": (Completion([7] * 9, [-1.0] * 9, "length"), "longer than max_completion_length: 9 tokens"),
    "a bool": (Completion([True, STOP], [-1.0] * 2, "stop"), "no whole number: True"),
    "a float": (Completion([7.0, STOP], [-1.0] * 2, "stop"), "no whole number: 7.0"),
    "a text": (Completion(["7", STOP], [-1.0] * 2, "stop"), "no whole number: '7'"),
    "negative": (Completion([-1, STOP], [-1.0] * 2, "stop"), "outside the vocabulary: -1"),
    "too large": (Completion([VOCABULARY, STOP], [-1.0] * 2, "stop"), "outside the vocabulary: 300"),
    "huge": (Completion([10**400, STOP], [-1.0] * 2, "stop"), "outside the vocabulary: 1000"),
    "an end inside": (Completion([STOP, 7, STOP], [-1.0] * 3, "stop"), "goes on after the end token 2"),
    "no end": (Completion([7, 8], [-1.0] * 2, "stop"), "stopped at token 8"),
    "cut early": (Completion([7, 8], [-1.0] * 2, "length"), "cut off by its length after 2 tokens"),
    "no log-probs": (Completion([7, STOP], None, "stop"), "without a log-probability for each"),
    "fewer log-probs": (Completion([7, STOP], [-1.0], "stop"), "without a log-probability for each"),
    "a null log-prob": (Completion([7, STOP], [None, -1.0], "stop"), "no number: None"),
    "NaN": (Completion([7, STOP], [NAN, -1.0], "stop"), "not finite: nan"),
    "infinite": (Completion([7, STOP], [-math.inf, -1.0], "stop"), "not finite: -inf"),
    "above 0": (Completion([7, STOP], [0.5, -1.0], "stop"), "above 0.*0.5"),
    "a huge whole log-prob": (Completion([7, STOP], [-(10**400), -1.0], "stop"), "too low"),
    "an unknown end": (Completion([7, STOP], [-1.0] * 2, "tool_calls"), "finish reason 'tool_calls'"),
    "no end's name": (Completion([7, STOP], [-1.0] * 2, {"stop": 1}), "finish reason {'stop': 1}"),
}


@pytest.mark.parametrize(("completion", "named"), WRONG.values(), ids=WRONG)
def test_a_rule_names_the_value_that_breaks_it(completion, named):
    assert re.search(named, broken_rule(COMPLETION_RULES, completion, ASKED))


def test_each_rule_is_broken_by_an_answer_of_the_table():
    told = {broken_rule(COMPLETION_RULES, completion, ASKED).split("{")[0] for completion, _ in WRONG.values()}
    for message, _ in COMPLETION_RULES:
        assert any(said.startswith(message.split("{")[0]) for said in told), message


def test_an_engine_in_this_process_may_say_that_the_students_numbers_are_not_finite():
    asked = Asked(LONGEST, VOCABULARY, frozenset([STOP]), logprobs=True, nonfinite=True)
    assert broken_rule(COMPLETION_RULES, Completion([7, STOP], [NAN, -math.inf], "stop"), asked) is None
    assert broken_rule(COMPLETION_RULES, Completion([7, STOP], [NAN, 0.5], "stop"), asked)


def test_log_probs_that_nobody_asked_for_are_not_looked_at():
    asked = Asked(LONGEST, VOCABULARY, frozenset([STOP]), logprobs=False)
    assert broken_rule(COMPLETION_RULES, Completion([7, STOP], "junk", "stop"), asked) is None


@given(JSON)
def test_rules_for_models_and_weights_take_answers_of_any_shape(answer):
    if not (isinstance(answer, dict) and isinstance(answer.get("id"), str)):
        assert broken_rule(MODEL_RULES, answer)
    for path, rules in WEIGHT_RULES.items():
        broken = broken_rule(rules, answer, {"lora_name": "atesd-0123456789ab"})
        assert broken or path == "/reset_prefix_cache" or isinstance(at(answer, "results"), list)


@pytest.mark.parametrize("length", [True, 0, -5, 1.5, "2048", [2048]])
def test_a_context_that_is_no_length_is_refused(length):
    assert "max_model_len" in broken_rule(MODEL_RULES, {"id": "m", "max_model_len": length})
    assert broken_rule(MODEL_RULES, {"id": "m", "max_model_len": 2048}) is None
    assert broken_rule(MODEL_RULES, {"id": "m"}) is None


@given(JSON, st.lists(st.text(max_size=3) | st.integers(0, 3), max_size=4))
def test_a_path_leads_to_what_is_there_or_to_none(answer, path):
    found = at(answer, *path)
    assert found is None or json.dumps(found) in json.dumps(answer)
