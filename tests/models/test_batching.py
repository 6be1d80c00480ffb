"""Packed rows: the same numbers as each sequence alone, and the right token behind every hidden state."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from atesd.models.attention.packed import packed_sdpa_forward, use_packed_attention
from atesd.models.batching import (
    ProblemSampler,
    assert_same_responses,
    chunks,
    hidden_rows,
    pack,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
RESPONSES = [[20, 21], [22, 23, 24, 25], [26]]


@pytest.fixture
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float64)
    use_packed_attention(model)
    return model


def test_each_hidden_state_of_a_packed_row_is_the_one_of_its_sequence_alone_and_predicts_its_target(model):
    packed = model.lm_head(hidden_rows(model.model, pack(PROMPTS, RESPONSES, "cpu")))
    alone = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0]
        alone.append(logits[len(prompt) - 1 : -1])  # logits at n predict token n + 1
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-10, atol=1e-12)
    assert pack(PROMPTS, RESPONSES, "cpu").targets.tolist() == [token for response in RESPONSES for token in response]


def test_no_gradient_crosses_from_one_sequence_of_a_row_to_another(model):
    batch = pack(PROMPTS, RESPONSES, "cpu")
    embedded = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    out = model.model(inputs_embeds=embedded, position_ids=batch.position_ids, attention_mask=batch.ends)
    out.last_hidden_state[0, 5:10].sum().backward()  # the second sequence: one prompt token and four of response
    used = embedded.grad[0].abs().sum(-1) > 0
    assert used.tolist() == [False] * 5 + [True] * 5 + [False] * 7


def test_packing_under_gradient_checkpointing_gives_the_same_gradient(model):
    def gradient():
        model.zero_grad()
        hidden_rows(model.model, pack(PROMPTS, RESPONSES, "cpu")).square().sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    model.train()
    expected = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=0.0)


def test_a_changed_response_token_is_caught_before_the_loss():
    student = pack(PROMPTS, RESPONSES, "cpu")
    assert_same_responses(student, pack([[1, 2], [3, 4, 5], [6]], RESPONSES, "cpu"))
    for other in ([[20, 21], [22, 23, 24, 99], [26]], [[20], [21, 22, 23, 24, 25], [99]]):
        with pytest.raises(AssertionError, match="same response token ids"):
            assert_same_responses(student, pack(PROMPTS, other, "cpu"))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        pack([[]], [[1]], "cpu")


def test_a_sequence_longer_than_a_sliding_window_is_refused():
    q = torch.zeros(1, 1, 6, 4)
    ends = torch.tensor([6], dtype=torch.int32).view(1, 1, 1, 1)
    with pytest.raises(ValueError, match="sliding window of 4"):
        packed_sdpa_forward(torch.nn.Module(), q, q, q, ends, sliding_window=4)


def test_attention_that_cannot_be_packed_is_refused_by_name(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="of LlamaForCausalLM is 'flex_attention'"):
        use_packed_attention(model)


def test_every_problem_is_visited_once_an_epoch_in_an_order_that_changes():
    sampler = ProblemSampler(5, seed=3)
    epochs = [sampler.draw(5) for _ in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert ProblemSampler(5, seed=3).draw(15) == [*epochs[0], *epochs[1], *epochs[2]]


def test_a_sampler_continues_where_its_state_was_taken():
    sampler = ProblemSampler(7, seed=0)
    sampler.draw(10)
    state, expected = sampler.state_dict(), sampler.draw(9)
    fresh = ProblemSampler(7, seed=0)
    fresh.load_state_dict(state)
    assert fresh.draw(9) == expected


def test_chunks_cover_everything_once():
    assert [list(range(10))[part] for part in chunks(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
