"""Hand-written derivatives against finite differences, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from atesd_kernels import divergence, linear_divergence, linear_logprobs

from .cases import DIVERGENCES, make_pair

CPU = torch.device("cpu")  # float64 lives on the torch backend


def inputs(shared):
    pair = make_pair(n=4, h=5, v=13, scale=0.3, dtype=torch.float64, shared=shared)
    bias = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(pair.student_weight)
    tensors = (pair.student_hidden, pair.student_weight, bias)
    return [t.clone().requires_grad_() for t in tensors], pair.teacher_hidden, pair.teacher_weight


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_passes_gradcheck(name, shared, reduction):
    leaves, teacher_hidden, teacher_weight = inputs(shared)
    # gradcheck moves the leaves in place: what the teacher has of them must be a copy
    teacher = (teacher_hidden, leaves[1].detach().clone() if shared else teacher_weight)
    teacher_bias = leaves[2].detach().clone()

    def loss(hidden, weight, bias):
        options = dict(divergence=name, beta=0.3, temperature=1.3, softcap=4.0, student_bias=bias, reduction=reduction)
        return linear_divergence(hidden, weight, *teacher, teacher_bias=teacher_bias, **options)

    assert gradcheck(loss, leaves)


@pytest.mark.parametrize("shared", (True, False))
def test_a_hidden_state_gradient_passes_gradcheck_with_a_shared_head(shared):
    leaves, teacher_hidden, teacher_weight = inputs(shared)
    assert gradcheck(lambda h: linear_divergence(h, leaves[1].detach(), teacher_hidden, teacher_weight), leaves[:1])


def test_given_logits_pass_gradcheck():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(4, 11, dtype=torch.float64, generator=g, requires_grad=True)
    teacher = student.detach() + 0.3 * torch.randn(4, 11, dtype=torch.float64, generator=g)
    for name in DIVERGENCES:
        assert gradcheck(lambda s, name=name: divergence(s, teacher, divergence=name, softcap=5.0), student)


def test_log_probabilities_pass_gradcheck():
    leaves, _, _ = inputs(True)
    targets = torch.tensor([0, 12, 5, 7], device=leaves[0].device)

    def logprobs(hidden, weight, bias):
        return linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, softcap=3.0)

    assert gradcheck(logprobs, leaves)
