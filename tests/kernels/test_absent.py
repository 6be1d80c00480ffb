"""What does not exist, does not count or is no number: entries at -inf, masked tokens, empty batches, NaN."""

import math

import pytest
import torch

import atesd_kernels as ak
from atesd_kernels import linear_divergence, linear_logprobs, planning, reference

from .cases import BACKENDS, DEVICE, compare, make_pair, relative_l2, size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd", "total_variation"))
def test_entries_absent_on_both_sides_contribute_nothing(divergence, shared, backend):
    pair = make_pair(**{**size(backend), "v": 300}, shared=shared)
    bias = torch.zeros(300, device=DEVICE)
    bias[250:] = -torch.inf
    hidden = pair.student_hidden.clone().requires_grad_()
    weights = [None if w is None else w[:250] for w in (pair.student_weight, pair.teacher_weight)]
    loss = linear_divergence(
        hidden,
        pair.student_weight,
        pair.teacher_hidden,
        pair.teacher_weight,
        student_bias=bias,
        teacher_bias=bias.clone(),
        divergence=divergence,
        backend=backend,
    )
    loss.backward()
    short = pair.student_hidden.clone().requires_grad_()
    expected = linear_divergence(short, weights[0], pair.teacher_hidden, weights[1], divergence=divergence)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_l2(hidden.grad, short.grad) <= 1e-5


def test_a_whole_block_of_absent_entries_contributes_nothing():
    present = planning.CPU_BLOCK_COLUMNS
    pair = make_pair(n=5, h=16, v=2 * present + 40)
    bias = torch.zeros(2 * present + 40, device=DEVICE)
    bias[present:] = -torch.inf
    targets = torch.arange(5, device=DEVICE)
    for shift in (0, present):  # absent behind, and before, the others
        bias_here, weight = bias.roll(shift), pair.student_weight.roll(shift, 0)
        hidden, short = (pair.student_hidden.clone().requires_grad_() for _ in range(2))
        few = pair.student_weight[:present]
        value = linear_logprobs(hidden, weight, targets + shift, bias=bias_here, backend="torch")
        expected = linear_logprobs(short, few, targets)
        torch.testing.assert_close(value, expected)
        loss = linear_divergence(hidden, weight, pair.teacher_hidden, student_bias=bias_here, backend="torch")
        true = reference.linear_divergence(short, few, pair.teacher_hidden)
        assert loss.item() == pytest.approx(true.item(), rel=1e-5)
        (value.sum() + 1000 * loss).backward()
        (expected.sum() + 1000 * true).backward()
        assert relative_l2(hidden.grad, short.grad) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ("log-probability", "top k with a bias", "top k that lists them"))
def test_the_entropy_of_a_row_whose_first_block_is_absent_is_that_of_the_others(loss, backend):
    pair = make_pair(n=3, h=8, v=1100)
    bias = torch.zeros(1100, device=DEVICE)
    bias[:1030] = -torch.inf  # more than a row kernel's block
    s = reference.logits(pair.student_hidden, pair.student_weight, bias)
    targets = torch.full((3,), 1050, device=DEVICE)
    if loss == "log-probability":
        tensors = (pair.student_hidden, pair.student_weight, targets)
        _, stats = linear_logprobs(*tensors, bias=bias, return_stats=True, backend=backend)
    else:
        ids = targets[:, None]
        if loss == "top k that lists them":
            ids, bias = torch.arange(1030, device=DEVICE).repeat(3, 1), None
            s = reference.logits(pair.student_hidden, pair.student_weight)
        logprobs = s.log_softmax(-1).gather(1, ids)
        _, stats = ak.linear_topk_divergence(
            *pair.tensors[:2], ids, logprobs, student_bias=bias, targets=targets, return_stats=True, backend=backend
        )
    true = reference.token_stats(s, s, targets)
    for name in ("student_entropy", "student_logprob", "student_top1_prob"):
        assert relative_l2(getattr(stats, name), getattr(true, name)) <= 1e-5, name


def test_a_token_only_the_teacher_can_say_costs_what_the_mathematics_says():
    s, t = torch.zeros(1, 4), torch.zeros(1, 4)
    s[0, 3] = -torch.inf
    p, q = t.softmax(1), s.softmax(1)
    assert ak.divergence(s, t, divergence="forward_kl").item() == math.inf
    assert ak.divergence(s, t, divergence="reverse_kl").item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    total_variation = (p - q).abs().sum().item() / 2
    assert ak.divergence(s, t, divergence="total_variation").item() == pytest.approx(total_variation, rel=1e-5)
    m = (p + q) / 2
    jsd = (p * (p / m).log()).sum() / 2 + (q[q > 0] * (q / m)[q > 0].log()).sum() / 2
    assert ak.divergence(s, t, divergence="jsd").item() == pytest.approx(jsd.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ("reverse_kl", "jsd", "total_variation", "skew_reverse_kl", "alpha"))
def test_the_gradient_where_a_token_only_the_teacher_can_say_is_the_oracle_s(divergence, backend):
    pair = make_pair(n=6, v=50, scale=0.5)
    absent, present = torch.zeros(2, 50, device=DEVICE)
    absent[3] = -torch.inf
    biases = {"student_bias": absent, "teacher_bias": present}
    result = compare(pair, divergence=divergence, backend=backend, trained_head=False, **biases)
    assert result.loss_error <= 1e-5 and result.hidden_error <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ("forward_kl", "skew_kl", "total_variation"))
@pytest.mark.parametrize("case", ("only the teacher can say it", "only the student can say it", "it is far away"))
def test_an_entry_clip_bounds_the_cost_of_a_token_that_one_model_rules_out(case, divergence, backend):
    pair = make_pair(n=6, v=50, scale=0.5)
    absent, present = torch.zeros(2, 50, device=DEVICE)
    absent[3] = -torch.inf
    if case == "it is far away":
        absent[3] = -300.0  # exp underflows, its logarithm does not
    biases = (present, absent) if case == "only the student can say it" else (absent, present)
    options = dict(student_bias=biases[0], teacher_bias=biases[1], divergence=divergence, beta=0.3, entry_clip=0.05)
    result = compare(pair, backend=backend, trained_head=False, **options)
    assert result.loss_error <= 1e-5 and result.hidden_error <= 1e-5


@pytest.mark.parametrize("divergence", ("jsd", "skew_kl", "alpha", "total_variation", "forward_kl"))
@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("temperatures", ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0)))
def test_a_shared_head_with_absent_entries_on_either_side_is_the_oracle_s(divergence, softcap, temperatures):
    pair = make_pair(n=6, v=50, scale=0.5)
    absent, present = torch.zeros(2, 50, device=DEVICE)
    absent[3] = -torch.inf
    for student_bias, teacher_bias in ((absent, None), (absent, present), (present, absent)):
        if divergence in ("forward_kl", "skew_kl") and teacher_bias is present and softcap is None:
            continue  # infinite, or beyond float64's own where()
        options = dict(
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            divergence=divergence,
            softcap=softcap,
            temperature=temperatures[0],
            teacher_temperature=temperatures[1],
        )
        expected = reference.linear_divergence(*pair.tensors, **options).item()
        assert linear_divergence(*pair.tensors, **options).item() == pytest.approx(expected, rel=1e-4)


def test_non_finite_hidden_states_give_a_non_finite_loss():
    pair = make_pair()
    for value in (torch.nan, torch.inf):
        broken = pair.student_hidden.clone()
        broken[3, 0] = value
        assert not linear_divergence(broken, *pair.tensors[1:]).isfinite()


@pytest.fixture
def new_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, masked", ((9, True), (0, True), (0, False)))
def test_nothing_to_learn_from_is_a_zero_loss_with_zero_gradients(n, masked, backend, new_memory_is_nan):
    pair = make_pair(**{**size(backend), "n": n})
    hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
    mask = torch.zeros(n, device=DEVICE) if masked else None
    loss = linear_divergence(hidden, weight, pair.teacher_hidden, mask=mask, backend=backend)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_masked_targets_may_hold_anything():
    pair = make_pair()
    targets = torch.full((67,), -100, device=DEVICE)
    targets[0] = 5
    mask = targets >= 0
    value = linear_logprobs(pair.student_hidden, pair.student_weight, targets, mask=mask)
    assert (value[1:] == 0).all() and value[0] < 0


def test_masked_tokens_may_carry_any_weight_and_any_mask_value_counts_once():
    pair = make_pair()
    mask = torch.arange(67, device=DEVICE) % 2 == 0
    weight = torch.where(mask, 1.0, torch.nan)
    expected = linear_divergence(*pair.tensors, mask=mask)
    assert linear_divergence(*pair.tensors, mask=mask, token_weight=weight).item() == pytest.approx(expected.item())
    assert linear_divergence(*pair.tensors, mask=mask.to(torch.bfloat16) * 3).equal(expected)
    with pytest.raises(ValueError, match="num_tokens must be positive, got 0"):
        linear_divergence(*pair.tensors, num_tokens=0)


def test_statistics_of_no_tokens_are_empty():
    pair = make_pair(n=0)
    loss, stats = linear_divergence(*pair.tensors, return_stats=True)
    assert loss.item() == 0 and stats.student_entropy.shape == (0,)
