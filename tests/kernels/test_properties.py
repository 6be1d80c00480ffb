"""What holds for all shapes and options (hypothesis)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd_kernels import divergence, linear_divergence

from .cases import DEVICE, DIVERGENCES, make_pair, relative_l2

few = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(2, 150))
scales = st.floats(1e-3, 3.0)
names = st.sampled_from(DIVERGENCES)
betas = st.floats(0.05, 0.95)


def pair_of(shape, scale, seed=0, **options):
    n, h, v = shape
    return make_pair(n, h, v, scale=scale, seed=seed, **options)


@few
@given(shapes, scales, names, betas, st.booleans(), st.integers(0, 99))
def test_divergences_are_never_negative_and_zero_at_equality(shape, scale, name, beta, shared, seed):
    pair = pair_of(shape, scale, seed, shared=shared)
    options = dict(divergence=name, beta=beta, reduction="none")
    assert (linear_divergence(*pair.tensors, **options) >= -1e-9).all()
    hidden = pair.student_hidden.clone().requires_grad_()
    value = linear_divergence(hidden, pair.student_weight, pair.student_hidden, **options)
    value.sum().backward()
    assert (value == 0).all() and (hidden.grad == 0).all()


@few
@given(shapes, scales, st.integers(0, 99))
def test_jsd_is_symmetric_at_one_half_and_bounded_by_log_2(shape, scale, seed):
    pair = pair_of(shape, scale, seed, shared=False)
    h_s, w_s, h_t, w_t = pair.tensors
    there = linear_divergence(h_s, w_s, h_t, w_t, divergence="jsd", reduction="none")
    back = linear_divergence(h_t, w_t, h_s, w_s, divergence="jsd", reduction="none")
    assert torch.allclose(there, back, rtol=1e-4, atol=1e-9)
    assert (there <= math.log(2) + 1e-6).all()


@few
@given(shapes, names, st.floats(-20, 20), st.integers(0, 99))
def test_a_constant_added_to_all_logits_changes_nothing(shape, name, constant, seed):
    n, _, v = shape
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(n, v, generator=g, dtype=torch.float64)
    t = s + 0.1 * torch.randn(n, v, generator=g, dtype=torch.float64)
    one = divergence(s, t, divergence=name, reduction="none")
    assert torch.allclose(one, divergence(s + constant, t, divergence=name, reduction="none"), rtol=1e-7, atol=1e-12)


@few
@given(shapes, scales, names, st.integers(1, 40), st.integers(0, 99))
def test_chunk_size_changes_the_result_by_rounding_only(shape, scale, name, rows, seed):
    pair = pair_of(shape, scale, seed)
    whole, small = (
        linear_divergence(*pair.tensors, divergence=name, reduction="none", chunk_bytes=b)
        for b in (None, 8 * shape[2] * rows)
    )
    assert torch.allclose(whole, small, rtol=1e-5, atol=1e-10)


@few
@given(shapes, scales, names, st.data(), st.integers(0, 99))
def test_masked_rows_have_no_influence(shape, scale, name, data, seed):
    pair = pair_of(shape, scale, seed)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]))).to(DEVICE)
    results = []
    for garbage in (0.0, torch.nan):
        hidden = torch.where(mask[:, None], pair.student_hidden, garbage).requires_grad_()
        loss = linear_divergence(hidden, pair.student_weight, pair.teacher_hidden, divergence=name, mask=mask)
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    assert results[0][0].equal(results[1][0]) and results[0][1].equal(results[1][1])
    assert (results[0][1][~mask] == 0).all()


@few
@given(shapes, scales, names, st.integers(0, 99))
def test_the_sum_over_shards_is_the_whole(shape, scale, name, seed):
    pair = pair_of((shape[0] + 1, *shape[1:]), scale, seed)
    n = shape[0] + 1
    half = n // 2

    def run(rows, num_tokens=None):
        weight = pair.student_weight.clone().requires_grad_()
        loss = linear_divergence(
            pair.student_hidden[rows], weight, pair.teacher_hidden[rows], divergence=name, num_tokens=num_tokens
        )
        loss.backward()
        return loss.detach(), weight.grad

    (a, ga), (b, gb), (both, g) = run(slice(half), n), run(slice(half, n), n), run(slice(n))
    assert torch.allclose(a + b, both, rtol=1e-5, atol=1e-10)
    assert relative_l2(ga + gb, g) <= 1e-5 or g.norm() < 1e-9


@pytest.mark.parametrize("beta, kl", ((0.0, "forward_kl"), (1.0, "reverse_kl")))
def test_the_endpoints_of_jsd_are_the_kls(beta, kl):
    pair = make_pair()
    jsd = linear_divergence(*pair.tensors, divergence="jsd", beta=beta)
    assert jsd.equal(linear_divergence(*pair.tensors, divergence=kl))


@pytest.mark.parametrize(
    "name, beta, kl",
    (
        ("skew_kl", 0.0, "forward_kl"),
        ("skew_reverse_kl", 1.0, "reverse_kl"),
        ("alpha", 0.0, "forward_kl"),
        ("alpha", 1.0, "reverse_kl"),
    ),
)
def test_other_families_end_in_the_kls_too(name, beta, kl):
    pair = make_pair(scale=0.3)
    value = linear_divergence(*pair.tensors, divergence=name, beta=beta, reduction="none")
    expected = linear_divergence(*pair.tensors, divergence=kl, reduction="none")
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-9)
