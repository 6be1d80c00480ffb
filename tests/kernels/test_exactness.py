"""Loss and gradients against float64, at the scale where self-distillation lives: mean KL from 1e-4 to 1."""

from itertools import product

import pytest
import torch

from atesd_kernels import linear_divergence, linear_logprobs, reference
from atesd_kernels.backends.torch_chunked import NEAR

from .cases import (
    BACKENDS,
    BF16_BACKENDS,
    DEVICE,
    DIVERGENCES,
    INTERPRETED,
    clip_between_entries,
    compare,
    make_pair,
    relative_l2,
    size,
    terms_of,
)

SCALES = {1e-4: 0.007, 1e-2: 0.07, 1e-1: 0.22, 1.0: 0.75}  # mean forward KL -> make_pair's scale
FP32_GRADIENT, BF16_GRADIENT = 1e-5, 5e-3
# a GPU's exponential is exact to 2e-7; the three rows of an interpreted pair average out less of that than 67
FP32_LOSS = {b: 2e-6 if INTERPRETED and b != "torch" else 1e-6 for b in BACKENDS}
HEADS = {
    "shared": dict(shared=True),
    "separate": dict(shared=False),
    "wider teacher": dict(shared=False, teacher_size=80),
    "views": dict(views=(None, None)),
    "views with heads": dict(views=(80, None, 48)),
}
# (backend, head); interpreted, one of two that run the same code is enough: fp32 separate heads go to "triton"
ON_HEADS = [(b, h) for b in BACKENDS for h in HEADS]


def assert_fp32(result, backend):
    assert result.hidden_error <= FP32_GRADIENT
    assert result.loss_error <= FP32_LOSS[backend]
    assert result.weight_error is None or result.weight_error <= FP32_GRADIENT
    assert result.bias_error is None or result.bias_error <= FP32_GRADIENT


@pytest.mark.parametrize("kl", SCALES)
def test_the_pairs_diverge_as_much_as_their_name_says(kl):
    result = compare(make_pair(scale=SCALES[kl]))
    assert kl / 2 < result.loss < 2 * kl


@pytest.mark.parametrize("backend, heads", ON_HEADS)
@pytest.mark.parametrize("kl", SCALES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_gradients_are_exact_however_near_the_teacher(divergence, kl, heads, backend):
    pair = make_pair(**size(backend), scale=SCALES[kl], **HEADS[heads])
    assert_fp32(compare(pair, divergence=divergence, beta=0.3, temperature=1.1, backend=backend), backend)


@pytest.mark.parametrize("backend", BF16_BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kl", SCALES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_gradients_keep_their_direction_when_teacher_and_student_nearly_agree(divergence, kl, heads, backend):
    pair = make_pair(scale=SCALES[kl], dtype=torch.bfloat16, **HEADS[heads])
    result = compare(pair, divergence=divergence, beta=0.3, temperature=1.1, backend=backend)
    assert result.hidden_error <= BF16_GRADIENT
    assert result.loss_error <= 1e-3


def test_the_bf16_bound_is_one_that_bf16_logits_break():
    pair = make_pair(scale=SCALES[1e-4], dtype=torch.bfloat16)
    true = pair.student_hidden.double().requires_grad_()
    reference.linear_divergence(true, pair.student_weight, pair.teacher_hidden).backward()
    s = (pair.student_hidden @ pair.student_weight.T).double()
    t = (pair.teacher_hidden @ pair.student_weight.T).double()
    naive = (s.softmax(-1) - t.softmax(-1)) @ pair.student_weight.double()
    assert relative_l2(naive, true.grad) > 20 * BF16_GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ("shared", "views", "views with heads"))
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_fp16_gradients_survive_the_end_of_the_fp16_range(divergence, heads, backend):
    pair = make_pair(**size(backend), scale=SCALES[1e-2], dtype=torch.float16, **HEADS[heads])
    # a loss scaler multiplies the loss: the gradient must not have underflowed before
    result = compare(pair, divergence=divergence, upstream=torch.tensor(4096.0), backend=backend)
    assert max(result.hidden_error, result.weight_error) <= 2e-3


OPTIONS = {
    "cold": dict(temperature=0.5),
    "hot": dict(temperature=2.0),
    "two temperatures": dict(temperature=1.1, teacher_temperature=0.9),
    "softcap": dict(softcap=8.0),
    "bias": dict(student_bias="bias"),
    "two biases": dict(student_bias="bias", teacher_bias="other"),
    "softcap, bias, temperature": dict(softcap=8.0, student_bias="bias", temperature=1.3),
    "mask": dict(mask="mask"),
    "token weights": dict(token_weight="weight"),
    "mask and weights": dict(mask="mask", token_weight="weight", num_tokens=1000),
    "sum": dict(reduction="sum"),
    "small chunks": dict(chunk_bytes=1009 * 8 * 10),
}


def materialise(options, n, v, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    named = {
        "bias": torch.randn(v, generator=g).to(DEVICE, dtype),
        "other": torch.randn(v, generator=g).to(DEVICE, dtype),
        "mask": (torch.arange(n) % 5 % 3 != 1).to(DEVICE),
        "weight": torch.rand(n, generator=g).to(DEVICE),
    }
    return {k: named.get(o, o) if isinstance(o, str) and k != "reduction" else o for k, o in options.items()}


def option_cases():
    """Interpreted, every option for one divergence of each kind (one sweep or two to the gradient), and every
    divergence with options that touch all of the kernels' code."""
    for (backend, heads), options, divergence in product(ON_HEADS, OPTIONS, DIVERGENCES):
        slow = INTERPRETED and backend != "torch"
        telling = divergence in ("forward_kl", "jsd") or options in ("softcap, bias, temperature", "mask and weights")
        if heads != "wider teacher" and (telling or not slow):
            yield divergence, options, heads, backend


@pytest.mark.parametrize("divergence, options, heads, backend", option_cases())
def test_every_option_is_exact_for_every_divergence(divergence, options, heads, backend):
    pair = make_pair(**size(backend), scale=0.07, **HEADS[heads])
    options = materialise(OPTIONS[options], len(pair.student_hidden), len(pair.student_weight))
    assert_fp32(compare(pair, divergence=divergence, beta=0.7, backend=backend, **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl, heads", ((1e-2, "shared"), (1.0, "shared"), (1e-2, "views")))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_entry_clip_bounds_terms_and_removes_their_gradient(divergence, kl, heads, backend):
    pair = make_pair(**size(backend), scale=SCALES[kl], **HEADS[heads])
    clip = clip_between_entries(pair, divergence, 0.3)
    clipped, whole = (
        compare(pair, divergence=divergence, beta=0.3, entry_clip=c, reduction="sum", backend=backend)
        for c in (clip, None)
    )
    assert clipped.loss < whole.loss
    assert max(clipped.hidden_error, clipped.weight_error) <= FP32_GRADIENT
    # Clipped KLs are sums of both signs that may come out near zero: the whole divergence is the yardstick. And a
    # logit's error, which cancels in a divergence's first order, does not where some of the terms are cut: no fp32
    # logits make the sum surer than an ulp of what is added.
    ulp = 2**-24 * terms_of(pair, divergence, 0.3).clamp_max(clip).abs().sum().item()
    assert clipped.loss_error * abs(clipped.loss) <= FP32_LOSS[backend] * whole.loss + ulp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ("shared", "views"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_token_clip_bounds_tokens_and_removes_their_gradient(divergence, heads, backend):
    pair = make_pair(**size(backend), scale=0.22, **HEADS[heads])
    mix = dict(teacher_mix=pair.teacher_mix)
    tokens = linear_divergence(*pair.tensors, divergence=divergence, beta=0.3, reduction="none", **mix)
    middle = 3 * len(tokens) // 5
    clip = tokens.double().sort().values[middle : middle + 2].mean().item()
    assert_fp32(compare(pair, divergence=divergence, beta=0.3, token_clip=clip, backend=backend), backend)
    hidden = pair.student_hidden.clone().requires_grad_()
    options = dict(divergence=divergence, beta=0.3, token_clip=clip, backend=backend, **mix)
    linear_divergence(hidden, *pair.tensors[1:], **options).backward()
    assert (hidden.grad.abs().sum(1) == 0).equal(tokens > clip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained_head, heads", ((False, "shared"), (True, "shared"), (True, "views with heads")))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_any_upstream_gradient_per_token_is_exact(divergence, trained_head, heads, backend):
    pair = make_pair(**size(backend), scale=0.07, **HEADS[heads])
    upstream = torch.randn(len(pair.student_hidden), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    result = compare(
        pair, divergence=divergence, trained_head=trained_head, reduction="none", upstream=upstream, backend=backend
    )
    assert_fp32(result, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_unrelated_teacher_and_student_are_exact_too(divergence, backend):
    pair = make_pair(**size(backend), scale=3.0)  # mean KL above 5
    far = make_pair(**size(backend), scale=8.0)  # logit differences beyond the near form
    s, t = (reference.logits(h, far.student_weight) for h in (far.student_hidden, far.teacher_hidden))
    assert (s - t).abs().max() > NEAR * (0.5 if INTERPRETED and backend != "torch" else 1)
    for p in (pair, far):
        result = compare(p, divergence=divergence, beta=0.3, backend=backend)
        assert max(result.hidden_error, result.weight_error) <= FP32_GRADIENT
        # A row's value contains the difference of two log-sum-exps, which are as large as logits (7 and 35 in the far
        # interpreted pair) and rounded as such: an ulp of 35 is 4e-6. Every backend misses rows by two or three of
        # those, and three rows need not average them out. Hence an ulp of the largest logit beside the relative bound.
        largest = max(reference.logits(h, p.student_weight).abs().max() for h in (p.student_hidden, p.teacher_hidden))
        rounding = 2 * 2**-24 * largest.item()
        assert result.loss_error * abs(result.loss) <= FP32_LOSS[backend] * result.loss + rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ("shared", "views"))
def test_the_loss_is_accurate_down_to_a_kl_of_1e_minus_8(heads, backend):
    result = compare(make_pair(**size(backend), scale=7e-5, **HEADS[heads]), backend=backend)
    assert 1e-9 < result.loss < 1e-7
    assert result.loss_error <= 1e-4
    assert result.hidden_error <= FP32_GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)))
@pytest.mark.parametrize("options", ("cold", "softcap, bias, temperature", "mask"))
def test_log_probabilities_and_their_gradients_are_exact(options, dtype, bound, backend):
    if dtype == torch.bfloat16 and backend not in BF16_BACKENDS:
        pytest.skip("the interpreter has no bf16 products")
    pair = make_pair(**size(backend), dtype=dtype)
    n, v = len(pair.student_hidden), len(pair.student_weight)
    options = {k.replace("student_", ""): o for k, o in materialise(OPTIONS[options], n, v, dtype).items()}
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for trained in (False, True):
        hidden = pair.student_hidden.clone().requires_grad_()
        weight = pair.student_weight.clone().requires_grad_(trained)
        value = linear_logprobs(hidden, weight, targets, backend=backend, **options)
        (value * upstream).sum().backward()
        true_hidden, true_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
        true = reference.linear_logprobs(true_hidden, true_weight, targets, **options)
        (true * upstream).sum().backward()
        assert relative_l2(value, true) <= 1e-5
        assert relative_l2(hidden.grad, true_hidden.grad) <= bound
        assert not trained or relative_l2(weight.grad, true_weight.grad) <= bound
