"""Softcap where it saturates, and beside entries excluded from the vocabulary, against float64."""

import math

import pytest
import torch

from atesd_kernels import divergence as logit_divergence
from atesd_kernels import linear_divergence, linear_logprobs, reference

from .cases import BACKENDS, BF16_BACKENDS, DEVICE, compare, make_pair, relative_l2

CAP = 30.0
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
FLOOR = 2 * CAP * 2**-24  # fp32's rounding of the largest log p - log q, of which an entry's gradient is a difference
DTYPES = [(b, d) for b in BACKENDS for d in TOLERANCE if d != torch.bfloat16 or b in BF16_BACKENDS]


def saturating(student, teacher, dtype=torch.float32):
    """Two-unit states whose first logit is `student` or `teacher`, `[N, 2]` each, and a head of three entries."""
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    hidden = torch.tensor([[s, 1.0] for s in student]), torch.tensor([[t, 1.5] for t in teacher])
    return [x.to(DEVICE, dtype) for x in (hidden[0], head, hidden[1])]


def losses_and_gradients(tensors, **options):
    """Per-token losses and hidden-state gradients of the op, and of the oracle."""
    backend = options.pop("backend", "torch")
    results = []
    for function, dtype, extra in (
        (linear_divergence, tensors[0].dtype, {"backend": backend}),
        (reference.linear_divergence, torch.float64, {}),
    ):
        hidden = tensors[0].detach().to(dtype, copy=True).requires_grad_()
        loss = function(hidden, *tensors[1:], softcap=CAP, reduction="none", **options, **extra)
        loss.sum().backward()
        results.append((loss.detach().double(), hidden.grad.double()))
    return results


def assert_rows_are_close(value, expected, bound, floor=FLOOR):
    """Row by row, so that no row hides behind a larger one."""
    value, expected = (x.reshape(len(x), -1) for x in (value, expected))
    assert value.isfinite().all()
    error = (value - expected).norm(dim=1)
    assert (error <= bound * expected.norm(dim=1) + floor).all(), (error, expected)


@pytest.mark.parametrize("backend, dtype", DTYPES)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd", "reverse_kl"))
def test_logits_that_saturate_on_opposite_sides_give_the_oracle_s_loss_and_gradient(divergence, shared, dtype, backend):
    student, teacher = (300.0, -300.0, 90.0, -500.0, 300.0), (-300.0, 300.0, -70.0, 200.0, 310.0)
    tensors = saturating(student, teacher, dtype)
    if not shared:
        tensors.append(tensors[1].clone())
    ours, oracle = losses_and_gradients(tensors, divergence=divergence, backend=backend)
    for value, expected in zip(ours, oracle, strict=True):
        assert_rows_are_close(value, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperatures", ((1.0, 1.0), (2.0, 0.7)))
def test_a_cap_that_hides_the_student_s_logit_keeps_the_difference(temperatures, backend):
    """At 150 and above 1 - tanh^2 is below fp32's step at 1: what the teacher says must come from elsewhere."""
    student, teacher = (150.0, 200.0, 250.0, -170.0), (40.0, -20.0, 3.0, -30.0)
    options = dict(temperature=temperatures[0], teacher_temperature=temperatures[1], backend=backend)
    ours, oracle = losses_and_gradients(saturating(student, teacher), **options)
    for value, expected in zip(ours, oracle, strict=True):
        assert_rows_are_close(value, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_a_token_that_saturates_leaves_the_other_tokens_of_its_batch_alone(divergence, backend):
    pair = make_pair(n=4, h=24, v=261, scale=0.007)
    student, head, teacher = (t.clone() for t in pair.tensors[:3])
    direction = head[0] / (head[0] @ head[0])
    student[2], teacher[2] = 300 * direction, -300 * direction
    ours, oracle = losses_and_gradients([student, head, teacher], divergence=divergence, backend=backend)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    for value, expected in zip(ours, oracle, strict=True):
        assert_rows_are_close(value, expected, 2e-5)
        assert_rows_are_close(value[others], expected[others], 2e-5, floor=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_logits_and_log_probabilities_of_saturated_tokens_are_the_oracle_s(backend):
    s = torch.tensor([[300.0, 1, 0], [-200.0, 250, 3], [40.0, 38, 60]], device=DEVICE)
    t = torch.tensor([[-300.0, 1.5, 0], [220.0, -90, 1], [60.0, 41, 40]], device=DEVICE)
    targets, identity = torch.tensor([0, 0, 1], device=DEVICE), torch.eye(3, device=DEVICE)
    for ours, oracle in (
        (
            lambda z: logit_divergence(z, t, softcap=CAP, reduction="none", backend=backend),
            lambda z: reference.token_divergence(reference.scaled(z, CAP, 1.0), reference.scaled(t.double(), CAP, 1.0)),
        ),
        (
            lambda z: linear_logprobs(z, identity, targets, softcap=CAP, backend=backend),
            lambda z: reference.linear_logprobs(z, identity, targets, softcap=CAP),
        ),
    ):
        leaf, true = s.clone().requires_grad_(), s.double().requires_grad_()
        value, expected = ours(leaf), oracle(true)
        value.sum().backward()
        expected.sum().backward()
        assert_rows_are_close(value.detach().double(), expected.detach(), 1e-5)
        assert_rows_are_close(leaf.grad.double(), true.grad, 1e-5, floor=1e-7)


TRANSFORMS = {
    "temperature": dict(temperature=2.0),
    "softcap": dict(softcap=15.0),
    "softcap, two temperatures": dict(softcap=15.0, temperature=2.0, teacher_temperature=0.5),
    "a tight cap": dict(softcap=0.5, temperature=0.7),
}


def padded(weight, bias):
    """The head with 128 more rows, whose bias of -inf excludes them."""
    more = torch.randn(128, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight)
    return torch.cat([weight, more]), torch.cat([bias, bias.new_full((128,), -math.inf)])


@pytest.mark.parametrize("backend, dtype", DTYPES)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_excluded_entries_stay_excluded_under_every_transform(transform, shared, dtype, backend):
    pair = make_pair(n=3, h=8, v=20, scale=0.5, dtype=dtype, shared=shared)
    bias = torch.linspace(-1, 1, 20, device=DEVICE).to(dtype)
    heads = [None if w is None else padded(w, bias)[0] for w in (pair.student_weight, pair.teacher_weight)]
    biases = dict(student_bias=padded(pair.student_weight, bias)[1])
    if not shared:
        biases["teacher_bias"] = biases["student_bias"].clone()
    hidden, short = pair.student_hidden.clone().requires_grad_(), pair.student_hidden.double().requires_grad_()
    options = dict(TRANSFORMS[transform], return_stats=True, backend=backend)
    loss, stats = linear_divergence(hidden, heads[0], pair.teacher_hidden, heads[1], **biases, **options)
    loss.backward()
    biases = dict.fromkeys(biases, bias)
    expected = reference.linear_divergence(
        short, pair.student_weight, pair.teacher_hidden, pair.teacher_weight, **biases, **TRANSFORMS[transform]
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5 if dtype == torch.float32 else 2e-3)
    assert relative_l2(hidden.grad, short.grad) <= 2 * TOLERANCE[dtype]
    assert (stats.student_entropy <= math.log(20) + 1e-5).all() and (stats.teacher_entropy <= math.log(20) + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_excluded_entries_stay_excluded_for_log_probabilities_and_given_logits(transform, backend):
    pair = make_pair(n=3, h=8, v=20, scale=0.5)
    options = {k: o for k, o in TRANSFORMS[transform].items() if k != "teacher_temperature"}
    weight, bias = padded(pair.student_weight, torch.zeros(20, device=DEVICE))
    targets = torch.tensor([0, 7, 19], device=DEVICE)
    hidden, short = pair.student_hidden.clone().requires_grad_(), pair.student_hidden.double().requires_grad_()
    value = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend, **options)
    expected = reference.linear_logprobs(short, pair.student_weight, targets, **options)
    value.sum().backward()
    expected.sum().backward()
    assert relative_l2(value, expected) <= 1e-5 and relative_l2(hidden.grad, short.grad) <= 1e-5
    s, t = (torch.nn.functional.linear(h, weight, bias) for h in (pair.student_hidden, pair.teacher_hidden))
    loss = logit_divergence(s, t, backend=backend, **options)
    true = reference.linear_divergence(*pair.tensors, **options)
    assert loss.item() == pytest.approx(true.item(), rel=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", (None, 15.0))
def test_an_entry_that_only_the_teacher_excludes_stays_excluded(softcap, backend):
    pair = make_pair(n=3, h=8, v=20, scale=0.5)
    student, teacher = torch.zeros(2, 20, device=DEVICE)
    teacher[3] = -math.inf
    result = compare(
        pair, divergence="forward_kl", softcap=softcap, student_bias=student, teacher_bias=teacher, backend=backend
    )
    assert result.loss_error <= 1e-5 and result.hidden_error <= 1e-5 and result.weight_error <= 1e-5
    q = reference.logits(pair.student_hidden, pair.student_weight, softcap=softcap).softmax(-1)
    # KL(p || q) is at least what the mass of the excluded entry costs
    assert result.loss > -0.9 * (1 - q[:, 3]).log().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_excluded_has_no_probability(backend):
    pair = make_pair(n=2, h=8, v=20)
    bias = torch.zeros(20, device=DEVICE)
    bias[7] = -math.inf
    targets = torch.tensor([7, 3], device=DEVICE)
    value = linear_logprobs(
        pair.student_hidden, pair.student_weight, targets, bias=bias, softcap=15.0, temperature=2.0, backend=backend
    )
    assert value[0] == -math.inf and value[1].isfinite()
