"""Attention of short sequences through oneDNN's products: sdpa's result and gradients, in full float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atesd.models.attention import causal
from atesd.models.attention.causal import BLOCK, LONGEST, causal_attention, serves
from atesd.models.attention.packed import packed_sdpa_forward
from atesd.models.recompute import selective_policy
from atesd_kernels.backends.matmul import onednn_keeps_fp32

pytestmark = pytest.mark.skipif(not onednn_keeps_fp32(), reason="torch's own kernel is used on this processor")


def states(length, heads=6, groups=2, value_dim=16, before=5):
    """Query, key and value of a sequence inside a packed row, as a model's projections lay them out; and a gradient."""
    torch.manual_seed(0)
    sizes = ((heads, 16), (groups, 16), (groups, value_dim))
    rows = [torch.randn(1, before + length + 4, *size).transpose(1, 2) for size in sizes]
    return [row[:, :, before : before + length] for row in rows], torch.randn(1, heads, length, value_dim)


def oracle(query, key, value, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def leaves(tensors, dtype):
    return [x.to(dtype).detach().requires_grad_() for x in tensors]


def assert_exact(inputs, of_out, scaling):
    ours, exact = leaves(inputs, torch.float32), leaves(inputs, torch.float64)
    out, expected = causal_attention(*ours, scaling), oracle(*exact, scaling)
    assert torch.dist(out.double(), expected) < 1e-6 * expected.norm()
    gradients = torch.autograd.grad(out, ours, of_out)
    for name, got, want in zip(
        ("query", "key", "value"), gradients, torch.autograd.grad(expected, exact, of_out.double()), strict=True
    ):
        assert got.shape == want.shape
        assert torch.dist(got.double(), want) < 2e-6 * want.norm(), name


@pytest.mark.parametrize("length", [2, 37, 256, LONGEST])
@pytest.mark.parametrize(("heads", "groups", "value_dim"), [(6, 2, 16), (4, 4, 16), (5, 1, 24)])
def test_output_and_gradients_are_those_of_float64(length, heads, groups, value_dim):
    inputs, of_out = states(length, heads, groups, value_dim)
    assert_exact(inputs, of_out, 0.25)


def test_one_token_attends_to_itself():
    (query, key, value), _ = states(1)
    out = causal_attention(query, key, value, 0.25)
    torch.testing.assert_close(out, value.repeat_interleave(3, 1))


def test_heads_in_parts_are_the_same(monkeypatch):
    inputs, of_out = states(50, heads=10, groups=5)
    for together in (0, 3):  # a key head at least, and a last part that is smaller
        monkeypatch.setattr(causal, "SCORE_BYTES", together * 2 * 50 * 50 * 4)
        sizes = [heads.stop - heads.start for heads, _, _ in causal.blocks(torch.empty(5, 2, 50, 16))]
        assert sizes[0] == max(1, together)
        assert_exact(inputs, of_out, 0.25)
        assert_exact(*states(3 * BLOCK, heads=10, groups=5), 0.25)


@pytest.mark.parametrize("length", [BLOCK, BLOCK + BLOCK // 2, BLOCK + BLOCK // 2 + 1, 2 * BLOCK, 3 * BLOCK - 1])
def test_blocks_meet_and_the_last_one_takes_a_small_remainder(length):
    found = causal.blocks(torch.empty(1, 3, length, 16))
    positions = [i for _, queries, _ in found for i in range(queries.start, queries.stop)]
    assert positions == list(range(length))
    assert all(seen == queries.stop for _, queries, seen in found), "a position sees itself and those before it"
    sizes = [queries.stop - queries.start for _, queries, _ in found]
    assert all(size == BLOCK for size in sizes[:-1]) and BLOCK // 2 < sizes[-1] <= BLOCK + BLOCK // 2
    assert_exact(*states(length), 0.25)


def test_gradients_stay_in_float32_where_backward_is_called_inside_autocast():
    inputs, of_out = states(50)
    ours = leaves(inputs, torch.float32)
    outside = torch.autograd.grad(causal_attention(*ours, 0.25), ours, of_out)
    out = causal_attention(*ours, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, ours, of_out)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_nothing_of_the_scores_size_is_kept_for_backward():
    inputs, _ = states(LONGEST)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        causal_attention(*leaves(inputs, torch.float32), 0.25)
    assert kept and max(x.numel() for x in kept) < BLOCK * LONGEST


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_selective_recomputation_runs_it_once():
    ours, of_out = leaves(states(50)[0], torch.float32), states(50)[1]
    contexts = partial(create_selective_checkpoint_contexts, selective_policy)
    with Names() as names:
        out = checkpoint(
            lambda *x: causal_attention(*x, 0.25).sin().square(), *ours, use_reentrant=False, context_fn=contexts
        )
        gradients = torch.autograd.grad(out, ours, of_out)
    assert names.seen.count("atesd::causal_attention") == 1
    assert names.seen.count("aten::sin") == 2, "what is cheap runs again"
    plain = torch.autograd.grad(causal_attention(*ours, 0.25).sin().square(), ours, of_out)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


class Attention(nn.Module):
    num_key_value_groups = 3


@pytest.mark.parametrize("scaling", [None, 0.1])
def test_a_packed_row_takes_it_for_its_short_sequences_and_sdpa_for_the_others(monkeypatch, scaling):
    lengths = []
    monkeypatch.setattr(
        causal, "causal_attention", lambda *args: lengths.append(args[0].shape[2]) or causal_attention(*args)
    )
    monkeypatch.setattr(causal, "LONGEST", 20)
    (query, key, value), _ = states(60, before=0)
    ends = torch.tensor([20, 41, 60], dtype=torch.int32).view(1, 1, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):  # computes in float32 nevertheless
        out, _ = packed_sdpa_forward(Attention(), query, key, value, ends, scaling=scaling)
    assert lengths == [20, 19]
    for part in (slice(0, 20), slice(20, 41), slice(41, 60)):
        exact = oracle(*(x[:, :, part].double() for x in (query, key, value)), scaling).transpose(1, 2)
        assert torch.dist(out[:, part].double(), exact) < 1e-6 * exact.norm()


def test_whatever_it_cannot_do_stays_with_sdpa():
    query = torch.empty(1, 6, LONGEST, 16)
    assert serves(query, {})
    assert not serves(torch.empty(1, 6, LONGEST + 1, 16), {}), "it is longer than LONGEST"
    assert not serves(query.double(), {})
    assert not serves(query.to("meta"), {})
    assert not serves(query, {"dropout": 0.1})
    assert not serves(query, {"position_bias": torch.zeros(1, 6, LONGEST, LONGEST)})


def test_what_is_traced_is_laid_out_as_what_is_computed():
    inputs, of_out = states(BLOCK, value_dim=24)
    torch.library.opcheck(causal_attention, (*leaves(inputs, torch.float32), 0.25))
    of_out = of_out.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(causal.causal_attention_backward, (of_out, *inputs, causal_attention(*inputs, 0.25), 0.25))


def test_a_compiled_step_has_the_same_gradients_and_leaves_nothing_behind():
    causal.largest_mask.cache_clear()
    inputs, of_out = states(40)
    ours = leaves(inputs, torch.float32)
    compiled = torch.compile(lambda *x: causal_attention(*x, 0.25), backend="aot_eager")
    found = torch.autograd.grad(compiled(*ours), ours, of_out)
    for got, want in zip(found, torch.autograd.grad(causal_attention(*ours, 0.25), ours, of_out), strict=True):
        torch.testing.assert_close(got, want)
