"""Attention of one new token in half precision on a CPU: sdpa's result, with the heads of a group as rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atesd.models.attention import one_token
from atesd.models.attention.one_token import folded_heads, folds, one_token_forward
from atesd.models.attention.packed import packed_sdpa_forward


def states(heads, groups, dtype=torch.bfloat16, new=1, value_dim=16):
    torch.manual_seed(0)
    shapes = ((3, heads, new, 16), (3, groups, 30, 16), (3, groups, 30, value_dim))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def oracle(query, key, value, mask, scaling):
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)


@pytest.mark.parametrize("mask", [None, "padding"])
@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_query_attends_as_the_heads_alone(dtype, heads, groups, value_dim, mask):
    query, key, value = states(heads, groups, dtype, value_dim=value_dim)
    if mask:
        mask = torch.arange(30).expand(3, 1, 1, 30) >= torch.tensor([0, 7, 29])[:, None, None, None]
    expected = oracle(query, key, value, mask, 0.3)
    out = one_token_forward(query, key, value, mask, 0.3)
    assert out.shape == (3, 1, heads, value_dim) and out.dtype == dtype
    # roundings of probabilities and of the result
    assert torch.dist(out.double(), expected) < torch.finfo(dtype).eps * expected.norm()


class Attention(nn.Module):
    num_key_value_groups = 3


def own(*args, **options):
    """transformers' "sdpa", as a model that is only evaluated finds it."""
    with folded_heads():
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **options)


@pytest.mark.parametrize("attend", [packed_sdpa_forward, own])
@pytest.mark.parametrize("autocast", [True, False])
def test_decoding_takes_it_with_and_without_padding(monkeypatch, autocast, attend):
    taken = []
    real = one_token.one_token_forward
    monkeypatch.setattr(one_token, "one_token_forward", lambda *args: taken.append(args) or real(*args))
    query, key, value = states(6, 2)
    query = query.float() if autocast else query  # after the rotary embedding
    for mask in (None, torch.ones(3, 1, 1, 30, dtype=torch.bool)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, weights = attend(Attention(), query, key, value, mask, scaling=0.25)
        expected = oracle(query, key, value, mask, 0.25)
        assert torch.dist(out.double(), expected) < 2**-7 * expected.norm() and weights is None
    assert len(taken) == 2


def test_whatever_it_cannot_do_stays_with_sdpa():
    query, key, value = states(6, 2)
    assert folds(query, key, value, None, {})
    several = states(6, 2, new=2)
    assert not folds(*several, None, {}), "a causal mask within the new tokens"
    assert not folds(*states(6, 2, torch.float32), None, {}), "the kernel takes a row as well as several"
    assert not folds(query, key, value, torch.ones(3, 6, 1, 30, dtype=torch.bool), {}), "a mask for each head"
    assert not folds(query, key, value, None, {"dropout": 0.1})
    assert not folds(query, key, value, None, {"softcap": 30.0}), "sdpa refuses it"
    assert not folds(query, key, value, None, {"s_aux": torch.zeros(6)})
    assert not folds(query, key, value, None, {"position_bias": torch.zeros(1, 6, 1, 30)})


def test_the_name_sdpa_is_transformers_own_again_afterwards_and_a_user_s_stays():
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), folded_heads():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    ALL_ATTENTION_FUNCTIONS["sdpa"] = of_user = lambda *args, **options: None
    try:
        with folded_heads():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is of_user
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is of_user
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
