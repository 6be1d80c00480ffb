"""What callers pass: counts of any numeric type, targets of any integer dtype, inference tensors, dual numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from torch.autograd import forward_ad

from atesd_kernels import (
    DivergenceTerm,
    divergence,
    exposure_logprobs,
    linear_divergence,
    linear_logprobs,
    reference,
)
from atesd_kernels.arguments import token_count
from atesd_kernels.divergences import get_divergence

from .cases import BACKENDS, DEVICE, make_pair, relative_l2

NARROW = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32)
ONE = {
    "int": 5,
    "float": 5.0,
    "numpy int": numpy.int64(5),
    "numpy float": numpy.float32(5),
    "numpy array": numpy.array(5),
    "tensor": torch.tensor(5),
    "tensor of shape [1]": torch.tensor([5], dtype=torch.int16),
}


@pytest.mark.parametrize("kind", ONE)
def test_num_tokens_may_be_any_number(kind):
    pair = make_pair()
    expected = linear_divergence(*pair.tensors, reduction="sum") / 5
    assert linear_divergence(*pair.tensors, num_tokens=ONE[kind]).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("zero", (0, 0.0, numpy.int64(0), numpy.float32(0), torch.tensor(0), torch.tensor([0.0])))
def test_a_count_of_zero_is_refused_whatever_its_type(zero):
    with pytest.raises(ValueError, match="num_tokens must be positive, got 0"):
        linear_divergence(*make_pair().tensors, num_tokens=zero)


@pytest.mark.parametrize("count", (float("nan"), float("inf"), -3, torch.tensor(-1)))
def test_a_count_that_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match=r"num_tokens must be (positive|finite), got"):
        divergence(torch.zeros(3, 5), torch.ones(3, 5), num_tokens=count)


@pytest.mark.parametrize("count", (torch.ones(67), "5", [5]))
def test_a_count_that_is_not_one_number_is_refused(count):
    with pytest.raises(TypeError, match="num_tokens must be one number, got"):
        linear_divergence(*make_pair().tensors, num_tokens=count)


def test_a_count_on_a_device_that_cannot_be_read_divides_nothing_by_zero():
    assert token_count(torch.tensor(0, device="meta")).shape == ()
    if DEVICE.type != "cpu":
        pair, mask = make_pair(), torch.zeros(67, device=DEVICE)
        hidden = pair.student_hidden.clone().requires_grad_()
        loss = linear_divergence(hidden, *pair.tensors[1:], mask=mask, num_tokens=mask.sum())
        loss.backward()
        assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW)
def test_targets_of_every_integer_dtype_are_token_ids(dtype, backend):
    """Also where the vocabulary has more entries than the dtype has values."""
    pair = make_pair(n=3, h=8, v=40_000 if backend == "torch" else 300)
    targets = torch.tensor([0, 7, 120], device=DEVICE)
    narrow = targets.to(dtype)
    arguments = (pair.student_hidden, pair.student_weight)
    logprobs = linear_logprobs(*arguments, targets, backend=backend)
    assert linear_logprobs(*arguments, narrow, backend=backend).equal(logprobs)
    _, stats = linear_divergence(*pair.tensors, targets=narrow, return_stats=True, backend=backend)
    assert torch.allclose(stats.student_logprob, logprobs, rtol=1e-5)
    span = [torch.tensor([n], device=DEVICE).to(dtype) for n in (3, 1)]
    mean = exposure_logprobs(arguments[0][None], arguments[1], narrow[None], *span, backend=backend)
    assert mean.item() == pytest.approx(logprobs[1:].mean().item(), rel=1e-5)


def test_masked_targets_of_a_narrow_dtype_may_still_hold_anything():
    pair = make_pair(n=3)
    targets, mask = torch.tensor([-100, 3, 5], dtype=torch.int8), torch.tensor([False, True, True])
    value = linear_logprobs(pair.student_hidden, pair.student_weight, targets.to(DEVICE), mask=mask.to(DEVICE))
    assert value[0] == 0 and (value[1:] < 0).all()
    with pytest.raises(TypeError, match="targets must be integers, got torch"):
        linear_logprobs(pair.student_hidden, pair.student_weight, targets.float().to(DEVICE))


LOSSES = {
    "linear_divergence": lambda h, pair: linear_divergence(h, pair.student_weight, pair.teacher_hidden),
    "linear_logprobs": lambda h, pair: linear_logprobs(
        h, pair.student_weight, torch.zeros(len(h), device=DEVICE).int()
    ),
    "divergence": lambda h, pair: divergence(h, pair.teacher_hidden),
    "exposure_logprobs": lambda h, pair: exposure_logprobs(
        h[None], pair.student_weight, *(torch.tensor(x, device=DEVICE) for x in ([[0, 0, 0]], [3], [1]))
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_forward_mode_derivative_is_refused_rather_than_zero(loss):
    pair = make_pair(n=3, h=8, v=20)
    hidden, function = pair.student_hidden, lambda h: LOSSES[loss](h, pair).sum()
    for derivative in (
        lambda: torch.func.jvp(function, (hidden,), (hidden,)),
        lambda: torch.func.jacfwd(function)(hidden),
        lambda: torch.func.hessian(function)(hidden),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            derivative()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        function(forward_ad.make_dual(hidden, hidden))


def test_a_forward_mode_derivative_by_the_head_or_its_bias_is_refused_and_by_nothing_else():
    pair = make_pair(n=3, h=8, v=20)
    bias = torch.zeros(20, device=DEVICE)
    with forward_ad.dual_level():
        for name, tensor in (("student_weight", pair.student_weight), ("student_bias", bias)):
            arguments = dict(zip(("student_hidden", "student_weight", "teacher_hidden"), pair.tensors[:3], strict=True))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"), torch.no_grad():
                linear_divergence(**{**arguments, name: forward_ad.make_dual(tensor, torch.ones_like(tensor))})
        # the teacher is a constant: it has no derivative of any mode
        teacher = forward_ad.make_dual(pair.teacher_hidden, torch.ones_like(pair.teacher_hidden))
        assert linear_divergence(pair.student_hidden, pair.student_weight, teacher).isfinite()


def in_inference_mode(*tensors):
    with torch.inference_mode():
        return [t.clone() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("shared", (True, False))
def test_a_teacher_made_in_inference_mode_trains_the_head(shared, reduction, backend):
    pair = make_pair(n=3, h=8, v=50, shared=shared)
    gradients = []
    for prepare in (lambda *tensors: list(tensors), in_inference_mode):
        hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
        teacher = prepare(*(t for t in pair.tensors[2:] if t is not None))
        mask, token_weight = prepare(torch.tensor([1, 0, 1], device=DEVICE), torch.rand(3, device=DEVICE) * 0 + 0.5)
        loss = linear_divergence(
            hidden, weight, *teacher, reduction=reduction, mask=mask, token_weight=token_weight, backend=backend
        )
        (loss.sum() * 2).backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(a.norm() > 0 and torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_backbone_in_inference_mode_trains_the_head_and_its_bias_by_log_probabilities():
    pair = make_pair(n=3, h=8, v=50)
    hidden, targets = in_inference_mode(pair.student_hidden, torch.tensor([0, 3, 49], device=DEVICE))
    weight, bias = pair.student_weight.clone().requires_grad_(), torch.zeros(50, device=DEVICE, requires_grad=True)
    linear_logprobs(hidden, weight, targets, bias=bias).sum().backward()
    true, true_bias = pair.student_weight.double().requires_grad_(), torch.zeros_like(bias).double().requires_grad_()
    reference.linear_logprobs(pair.student_hidden, true, targets.clone(), bias=true_bias).sum().backward()
    assert relative_l2(weight.grad, true.grad) <= 1e-5 and relative_l2(bias.grad, true_bias.grad) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("forward_kl", "reverse_kl", "jeffreys", "jsd"))
def test_a_term_that_only_carries_a_built_in_name_takes_no_shortcut_of_the_built_in_one(name, backend):
    """Its mathematics is total variation's, whose derivatives sum to neither of the known values."""
    own = replace(get_divergence("total_variation", 0.5), name=name)
    for term, beta in ((own, 0.5), (own, 0.0), (own, 1.0)):
        pair = make_pair(n=3, h=8, v=50, scale=0.3)
        hidden, true = pair.student_hidden.clone().requires_grad_(), pair.student_hidden.double().requires_grad_()
        loss = linear_divergence(hidden, *pair.tensors[1:], divergence=term, beta=beta, backend=backend)
        loss.backward()
        reference.linear_divergence(true, *pair.tensors[1:], divergence="total_variation").backward()
        assert relative_l2(hidden.grad, true.grad) <= 1e-5
    plain = DivergenceTerm(name, lambda log_p, log_q, beta: own.term(log_p, log_q, beta))
    value = linear_divergence(*pair.tensors, divergence=plain, backend="torch")
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(("convert", "kind"), [(numpy.asarray, "ndarray"), (list, "list")])
@pytest.mark.parametrize("name", ["mask", "token_weight", "targets"])
def test_what_is_no_tensor_is_refused_by_name(name, convert, kind):
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    with pytest.raises(TypeError, match=rf"{name} must be a tensor, got {kind}"):
        linear_divergence(hidden, weight, hidden, **{name: convert([1, 0, 1])})


def test_targets_of_log_probabilities_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="targets must be a tensor, got list"):
        linear_logprobs(torch.randn(3, 8), torch.randn(20, 8), [1, 2, 3])


LAYER = torch.nn.Linear(8, 20)
ROWS, SEQUENCES = torch.zeros(3, 8), torch.zeros(2, 3, 8)
IDS, COUNTS = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 2])
NO_TENSORS = {
    "student_weight": lambda: linear_divergence(ROWS, LAYER, ROWS),
    "student_weight with a teacher's": lambda: linear_divergence(ROWS, LAYER, ROWS, LAYER),
    "teacher_weight": lambda: linear_divergence(ROWS, LAYER.weight, ROWS, LAYER),
    "student_bias": lambda: linear_divergence(ROWS, LAYER.weight, ROWS, student_bias=LAYER),
    "weight": lambda: linear_logprobs(ROWS, LAYER, IDS[0]),
    "weight of spans": lambda: exposure_logprobs(SEQUENCES, LAYER, IDS, COUNTS, COUNTS - 1),
    "student_hidden": lambda: linear_divergence([ROWS], LAYER.weight, ROWS),
    "teacher_hidden": lambda: linear_divergence(ROWS, LAYER.weight, None),
    "hidden": lambda: linear_logprobs(ROWS.numpy(), LAYER.weight, IDS[0]),
    "student_logits": lambda: divergence(ROWS.numpy(), ROWS),
}


@pytest.mark.parametrize("call", NO_TENSORS)
def test_a_layer_or_an_array_in_the_place_of_a_tensor_is_refused_by_name(call):
    with pytest.raises(
        TypeError, match=rf"^{call.split()[0]} must be a tensor.* got (Linear|list|ndarray|None)"
    ) as told:
        NO_TENSORS[call]()
    assert ("pass its .weight" in str(told.value)) == ("Linear" in str(told.value))
