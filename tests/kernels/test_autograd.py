"""The losses in torch's machinery: what backward forms and refuses, torch.compile, operator registration, autocast."""

import ast
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import atesd_kernels as ak
from atesd_kernels import exposure_logprobs, linear_divergence, linear_logprobs, planning, reference
from atesd_kernels.spec import DivergenceSpec

from .cases import DEVICE, make_pair, relative_l2

SPEC = DivergenceSpec(
    backend="torch", divergence="forward_kl", beta=0.5, temperature=1.0, teacher_temperature=1.0, softcap=None,
    entry_clip=None, token_clip=None, logits_dtype=torch.float32, compute_dtype=torch.float32, chunk_bytes=None,
    stats=True, hidden_grad=True,
)  # fmt: skip


def assert_compiled_gives_the_same_gradient(step, hidden):
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert gradients[0].norm() > 0 and torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_backward_can_run_twice_and_gives_the_same_again(reduction):
    pair = make_pair()
    hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
    loss = linear_divergence(hidden, weight, pair.teacher_hidden, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(a.equal(b) and a.norm() > 0 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("trained_head", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_second_derivative_is_refused_rather_than_wrong(reduction, trained_head):
    pair = make_pair()
    hidden = pair.student_hidden.clone().requires_grad_()
    weight = pair.student_weight.clone().requires_grad_(trained_head)
    loss = linear_divergence(hidden, weight, pair.teacher_hidden, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (gradient**2).sum().backward()


def test_several_upstream_gradients_go_through_one_graph_at_once():
    pair = make_pair(n=7)
    hidden = pair.student_hidden.clone().requires_grad_()
    loss = linear_divergence(hidden, *pair.tensors[1:], reduction="none")
    (one_by_one,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
    rows = torch.eye(7, device=DEVICE)
    (batched,) = torch.autograd.grad(loss, hidden, rows, is_grads_batched=True)
    assert batched.shape == (7, *hidden.shape) and torch.allclose(batched.sum(0), one_by_one, rtol=1e-6)


def test_only_required_gradients_are_formed():
    pair = make_pair()
    for wanted in ((True, False), (False, True), (False, False)):
        hidden = pair.student_hidden.clone().requires_grad_(wanted[0])
        weight = pair.student_weight.clone().requires_grad_(wanted[1])
        loss = linear_divergence(hidden, weight, pair.teacher_hidden)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert (hidden.grad is not None, weight.grad is not None) == wanted
    teacher = pair.teacher_hidden.clone().requires_grad_()
    assert not linear_divergence(pair.student_hidden, pair.student_weight, teacher).requires_grad


def test_an_fp16_head_gradient_does_not_overflow_on_the_way():
    pair = make_pair(n=256, dtype=torch.float16)
    hidden = (pair.student_hidden * 30).to(torch.float16)
    weight = pair.student_weight.clone().requires_grad_()
    linear_divergence(hidden, weight, pair.teacher_hidden).backward()
    true = pair.student_weight.double().requires_grad_()
    reference.linear_divergence(hidden, true, pair.teacher_hidden, pair.student_weight.double()).backward()
    assert relative_l2(weight.grad, true.grad) <= 5e-3


def test_backward_forms_the_gradients_of_a_trained_head_s_rows_only_once(monkeypatch):
    from atesd_kernels.backends.logit_source import LinearGradients

    calls = []
    take = LinearGradients.take_gradient
    monkeypatch.setattr(LinearGradients, "take_gradient", lambda self, *a: (calls.append(1), take(self, *a)))
    pair = make_pair()
    weight = pair.student_weight.clone().requires_grad_()
    loss = linear_divergence(pair.student_hidden, weight, pair.teacher_hidden, reduction="none", backend="torch")
    assert not calls
    loss.sum().backward()
    assert calls and weight.grad.norm() > 0


def test_torch_compile_traces_a_caller_without_a_graph_break():
    pair = make_pair()

    def step(hidden, weight, teacher, mask, targets):
        loss = linear_divergence(hidden * 1.0, weight, teacher, mask=mask, temperature=1.1, divergence="jsd")
        return loss + linear_logprobs(hidden, weight, targets, mask=mask).mean()

    mask = torch.arange(67, device=DEVICE) % 3 > 0
    targets = torch.zeros(67, dtype=torch.long, device=DEVICE)
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
        function(hidden, weight, pair.teacher_hidden, mask, targets).backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def no_search(monkeypatch):
    """This package may not ask `find_spec`: torch 2.13 can trace it, torch 2.11 cannot. torch itself may: it asks while
    it compiles, and when it first meets a GPU, outside of what is traced."""
    search, folder = importlib.util.find_spec, Path(ak.__file__).parent

    def find_spec(name, package=None):
        if folder in Path(sys._getframe(1).f_code.co_filename).parents:
            raise AssertionError(f"searches for {name} while it is traced")
        return search(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("backend", ("auto", *(b for b in planning.BACKENDS if b != planning.CPP)))
def test_torch_compile_traces_a_caller_on_a_gpu_without_a_graph_break(backend, no_search):
    calls, indexed = [], torch.backends.cuda.is_built()

    def keep(graph, inputs):
        calls.extend(node.args for node in graph.graph.nodes if str(node.target).startswith("atesd_kernels"))
        return graph

    def step(hidden, weight, teacher, bias, targets, lengths):
        options = dict(mask=targets > 0, targets=targets, entry_clip=0.1, divergence="jsd", backend=backend)
        loss = linear_divergence(hidden, weight, teacher, student_bias=bias, **options)
        loss = loss + ak.divergence(hidden @ weight.T, teacher @ weight.T, **options)
        values = linear_logprobs(hidden, weight, targets, mask=targets > 0, softcap=30.0, backend=backend)
        if indexed:
            loss = loss + exposure_logprobs(hidden, weight, targets, lengths, lengths // 2, backend=backend).sum()
        return loss + values.sum()

    # A GPU's tensors, without a GPU. A CPU build of torch can neither index them nor record gradients.
    with FakeTensorMode(), torch.device("cuda"):
        hidden, teacher = torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16)
        weight, bias = torch.zeros(50, 16, dtype=torch.bfloat16), torch.zeros(50, dtype=torch.bfloat16)
        targets, lengths = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        torch.compile(step, fullgraph=True, backend=keep)(hidden, weight, teacher, bias, targets, lengths)
    chosen = [ast.literal_eval(arguments[-1])["backend"] for arguments in calls]
    assert len(chosen) >= 3
    assert set(chosen) == {"triton" if backend == "auto" else backend}


@pytest.mark.parametrize("backend", [b for b in planning.BACKENDS if planning.unavailable(b, DEVICE) is None])
def test_torch_compile_traces_a_caller_that_names_its_backend(backend, no_search):
    pair = make_pair(n=8, v=50)

    def step(hidden):
        return linear_divergence(hidden * 1.0, pair.student_weight, pair.teacher_hidden, backend=backend)

    assert_compiled_gives_the_same_gradient(step, pair.student_hidden)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="opcheck compares with the CPU implementation")
def test_the_registered_operators_keep_torch_s_rules():
    pair = make_pair(n=5, h=4, v=11)
    hidden = pair.student_hidden.clone().requires_grad_()
    arguments = (hidden, pair.student_weight, None, pair.teacher_hidden, None, None, None, None, None)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for weighted in (False, True):
        spec = replace(SPEC, weighted=weighted).encode()
        torch.library.opcheck(ak.ops.linear_divergence_op, (*arguments, spec), test_utils=tests)
    for views in ((None, None), (6, None)):
        pair = make_pair(n=5, h=4, v=11, views=views)
        mix = pair.teacher_mix.double()[:, None].expand(2, 5)
        teacher = (list(pair.teacher_hidden), list(pair.teacher_weight), None, mix)
        arguments = (hidden, pair.student_weight, None, *teacher, None, None, None, SPEC.encode())
        torch.library.opcheck(ak.ops.linear_divergence_views_op, arguments, test_utils=tests)


def test_a_spec_survives_its_way_through_an_operator_to_the_last_bit():
    numbers = dict(
        temperature=1 / 3, teacher_temperature=5e-324, entry_clip=0.1 + 0.2, token_clip=1.7976931348623157e308
    )
    spec = replace(SPEC, **numbers, softcap=math.pi, chunk_bytes=1 << 40, group='a "name"', logits_dtype=torch.bfloat16)
    assert type(spec).decode(spec.encode()) == spec


def test_options_may_be_numpy_s_numbers():
    pair, numpy = make_pair(), pytest.importorskip("numpy")
    plain = dict(temperature=1.25, softcap=8.0, entry_clip=0.5, beta=0.25)
    losses = [
        linear_divergence(*pair.tensors, divergence="jsd", **{n: kind(x) for n, x in plain.items()})
        for kind in (float, numpy.float32, numpy.float64)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_autocast_is_respected():
    pair = make_pair()
    hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_divergence(hidden, weight, pair.teacher_hidden)
    loss.backward()
    rounded = [t.to(torch.bfloat16) for t in (hidden.detach(), weight.detach())]
    expected = linear_divergence(*rounded, pair.teacher_hidden.to(torch.bfloat16))
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    # the difference of the hidden states is taken before autocast rounds it, so it is the better of the two
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert loss.item() != linear_divergence(*pair.tensors).item()


@pytest.mark.parametrize("hidden_dtype", (torch.bfloat16, torch.float32))
def test_autocast_takes_a_head_of_another_dtype_than_the_hidden_states(hidden_dtype):
    pair = make_pair(scale=0.2)
    hidden = pair.student_hidden.to(hidden_dtype, copy=True).requires_grad_()
    weight = pair.student_weight.clone().requires_grad_()
    bias = torch.zeros(len(weight), device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_divergence(hidden, weight, pair.teacher_hidden, student_bias=bias)
        linear_logprobs(hidden, weight, torch.zeros(67, dtype=torch.long, device=DEVICE)).sum()
    loss.backward()
    true = pair.student_hidden.to(hidden_dtype).double().requires_grad_()
    reference.linear_divergence(true, pair.student_weight.to(torch.bfloat16), pair.teacher_hidden).backward()
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (hidden_dtype, torch.float32, torch.float32)
    assert relative_l2(hidden.grad, true.grad) <= 0.05  # the operands are rounded to bf16


def test_torch_compile_keeps_sizes_and_options_symbolic():
    pair = make_pair()

    def step(hidden, teacher, mask, clip, temperature):
        targets = torch.zeros(hidden.shape[:1], dtype=torch.long, device=DEVICE)
        options = dict(mask=mask, entry_clip=clip, temperature=temperature, targets=targets, return_stats=True)
        loss, stats = linear_divergence(hidden, pair.student_weight, teacher, **options)
        s, t = (h @ pair.student_weight.T for h in (hidden, teacher))
        return loss + ak.divergence(s, t, mask=mask) + stats.student_entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, clip, temperature in ((67, 0.1, 1.1), (41, 0.2, 1.3)):
        arguments = (pair.student_hidden[:rows], pair.teacher_hidden[:rows], torch.ones(rows, device=DEVICE))
        assert torch.allclose(compiled(*arguments, clip, temperature), step(*arguments, clip, temperature), rtol=1e-5)


def test_torch_compile_takes_a_divergence_that_nobody_registered():
    def squared(log_p, log_q, beta):
        p, q = log_p.exp(), log_q.exp()
        return (p - q) ** 2, 2 * q * (q - p)

    term, pair = ak.DivergenceTerm("never registered", squared), make_pair(scale=0.3)

    def step(hidden):
        return linear_divergence(hidden * 1.0, pair.student_weight, pair.teacher_hidden, divergence=term)

    assert_compiled_gives_the_same_gradient(step, pair.student_hidden)
