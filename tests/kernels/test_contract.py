"""What the signature promises beside numbers: shapes, statistics, memory, divergences of one's own, errors."""

import pytest
import torch

import atesd_kernels as ak
from atesd_kernels import linear_divergence, linear_logprobs, reference

from .cases import BACKENDS, DEVICE, make_pair, relative_l2, size


def test_leading_shapes_are_free():
    pair = make_pair(n=12)
    flat = linear_divergence(*pair.tensors, reduction="none")
    shaped = linear_divergence(
        pair.student_hidden.view(2, 3, 2, -1),
        pair.student_weight,
        pair.teacher_hidden.view(2, 3, 2, -1),
        mask=torch.ones(2, 3, 2, device=DEVICE),
        reduction="none",
    )
    assert shaped.shape == (2, 3, 2) and shaped.flatten().equal(flat)


def test_strided_inputs_are_read_as_they_are():
    pair = make_pair(n=12)
    strided = [t.repeat_interleave(2, 0)[::2].T.contiguous().T for t in pair.tensors[:3]]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.allclose(linear_divergence(*strided), linear_divergence(*pair.tensors), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"softcap": 30.0, "temperature": 1.2}, {"entry_clip": 0.003}))
@pytest.mark.parametrize("scale", (0.1, 8.0))
@pytest.mark.parametrize("views", (None, (None, None), (30, None)))
def test_statistics_are_those_of_the_dense_distributions(views, scale, options, backend):
    pair = make_pair(**{**size(backend), "h": 24}, scale=scale, views=views)
    n, v = len(pair.student_hidden), len(pair.student_weight)
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loss, stats = linear_divergence(
        *pair.tensors, teacher_mix=pair.teacher_mix, targets=targets, return_stats=True, reduction="none",
        backend=backend, **options,
    )  # fmt: skip
    scaling = {k: v for k, v in options.items() if k != "entry_clip"}
    s, t = reference.logit_pair(*pair.tensors, teacher_mix=pair.teacher_mix, **scaling)
    for name, value, true in zip(stats._fields, stats, reference.token_stats(s, t, targets), strict=True):
        assert value.shape == (n,) and not value.requires_grad, name
        if name == "top1_agree":
            assert value.dtype == torch.bool and value.equal(true)
        else:
            assert relative_l2(value, true) <= 1e-5, name
    assert ("entry_clip" in options) == (not torch.allclose(loss, stats.divergence))


def test_statistics_without_targets_or_teacher_are_none_and_masked_tokens_zero():
    pair = make_pair()
    mask = torch.arange(67, device=DEVICE) % 2 == 0
    _, stats = linear_divergence(*pair.tensors, mask=mask, return_stats=True)
    assert stats.student_logprob is None and stats.teacher_logprob is None
    assert (stats.student_entropy[~mask] == 0).all() and (stats.student_entropy[mask] > 0).all()
    targets = torch.zeros(67, dtype=torch.long, device=DEVICE)
    value, stats = linear_logprobs(pair.student_hidden, pair.student_weight, targets, return_stats=True)
    assert stats.student_logprob.equal(value) and stats.teacher_entropy is None and stats.top1_agree is None
    true = reference.token_stats(*[reference.logits(pair.student_hidden, pair.student_weight)] * 2)
    assert relative_l2(stats.student_entropy, true.student_entropy) <= 1e-5
    assert relative_l2(stats.student_top1_prob, true.student_top1_prob) <= 1e-5


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    from atesd_kernels.backends import torch_chunked
    from atesd_kernels.spec import DivergenceSpec

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.numel = max(Largest.numel, out.numel())
            return out

    pair = make_pair(n=640, v=5000)
    rows = 40
    spec = DivergenceSpec(
        backend="torch", divergence="forward_kl", beta=0.5, temperature=1.0, teacher_temperature=1.0, softcap=None,
        entry_clip=None, token_clip=None, logits_dtype=torch.float32, compute_dtype=torch.float32,
        chunk_bytes=8 * 5000 * rows, stats=True, hidden_grad=True, weight_grad=True,
    )  # fmt: skip
    with Largest():
        torch_chunked.divergence_rows(spec, *pair.tensors, None, None, None, None, None)
    assert rows * 4096 <= Largest.numel <= max(rows * 5000, pair.student_weight.numel())


def test_a_divergence_of_ones_own_takes_two_lines():
    def squared(log_p, log_q, beta):
        p, q = log_p.exp(), log_q.exp()
        return (p - q) ** 2, 2 * q * (q - p)

    term = ak.DivergenceTerm("squared_of_this_test", squared)
    pair = make_pair(scale=0.3)
    hidden = pair.student_hidden.clone().requires_grad_()
    loss = linear_divergence(hidden, pair.student_weight, pair.teacher_hidden, divergence=term, entry_clip=1e-4)
    loss.backward()
    true = pair.student_hidden.double().requires_grad_()
    expected = reference.linear_divergence(
        true, pair.student_weight, pair.teacher_hidden, divergence=term, entry_clip=1e-4
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_l2(hidden.grad, true.grad) <= 1e-4
    assert ak.register_divergence(term) is term
    by_name = linear_divergence(*pair.tensors, divergence="squared_of_this_test", entry_clip=1e-4)
    assert by_name.equal(loss.detach())


def test_a_divergence_of_ones_own_can_be_registered_again_but_not_in_place_of_a_built_in_one():
    def twice(log_p, log_q, beta):
        p, q = log_p.exp(), log_q.exp()
        return 2 * (p - q).abs(), 2 * q * torch.sign(q - p)

    pair = make_pair(scale=0.3)
    for factor in (2, 4):  # a notebook's cell, edited and run again
        scaled = lambda log_p, log_q, beta, f=factor: tuple(f / 2 * z for z in twice(log_p, log_q, beta))  # noqa: E731
        ak.register_divergence(ak.DivergenceTerm("cell", scaled))
        value = linear_divergence(*pair.tensors, divergence="cell")
        expected = 2 * factor * linear_divergence(*pair.tensors, divergence="total_variation")
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(ValueError, match="'jsd' is one of this package's own"):
        ak.register_divergence(ak.DivergenceTerm("jsd", twice))


def test_modules_are_the_functions_with_options_fixed():
    pair = make_pair()
    module = ak.LinearDivergence(divergence="jsd", beta=0.3, temperature=1.1)
    assert module(*pair.tensors).equal(linear_divergence(*pair.tensors, divergence="jsd", beta=0.3, temperature=1.1))
    s, t = (h @ pair.student_weight.T for h in (pair.student_hidden, pair.teacher_hidden))
    assert ak.Divergence()(s, t).equal(ak.divergence(s, t))
    targets = torch.zeros(67, dtype=torch.long, device=DEVICE)
    logprobs = ak.LinearLogprobs(temperature=2.0)(pair.student_hidden, pair.student_weight, targets)
    assert logprobs.equal(linear_logprobs(pair.student_hidden, pair.student_weight, targets, temperature=2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exposure_logprobs_average_over_what_the_teacher_has_not_seen(backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 7, 16, generator=g).to(DEVICE), torch.randn(50, 16, generator=g).to(DEVICE)
    targets = torch.randint(0, 50, (3, 7), generator=g).to(DEVICE)
    targets[0, 5:] = -100  # padding may hold anything
    lengths, exposed = torch.tensor([5, 7, 4], device=DEVICE), torch.tensor([2, 0, 4], device=DEVICE)
    logprobs = reference.linear_logprobs(hidden, weight, targets)
    expected = [logprobs[0, 2:5].mean().item(), logprobs[1].mean().item(), 0.0]
    value = ak.exposure_logprobs(hidden, weight, targets, lengths, exposed, backend=backend)
    assert value.tolist() == pytest.approx(expected, rel=1e-5)


def test_exposure_logprobs_give_the_statistics_of_the_span():
    pair = make_pair(n=6)
    hidden = pair.student_hidden.view(2, 3, -1)
    targets = torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    lengths, exposed = torch.tensor([3, 2], device=DEVICE), torch.tensor([1, 5], device=DEVICE)  # 5: nothing is left
    arguments = (hidden, pair.student_weight, targets, lengths, exposed)
    means, stats = ak.exposure_logprobs(*arguments, return_stats=True)
    assert torch.allclose(means, ak.exposure_logprobs(*arguments)) and means[1] == 0
    assert stats.student_logprob.sum(1).tolist() == pytest.approx([2 * means[0].item(), 0.0])
    assert ((stats.student_entropy > 0) == torch.tensor([[False, True, True], [False] * 3], device=DEVICE)).all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU spans are the caller's promise")
@pytest.mark.parametrize(
    "lengths, exposed, message",
    (
        ([4, 3], [0, 0], "lengths must lie in [0, 3], the tokens there are, got 4"),
        ([-1, 3], [0, 0], "got -1"),
        ([3, 3], [0, -2], "exposed must not be negative, got -2"),
    ),
)
def test_a_span_outside_the_sequence_is_refused(lengths, exposed, message):
    pair = make_pair(n=6)
    targets = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError) as error:
        ak.exposure_logprobs(
            pair.student_hidden.view(2, 3, -1), pair.student_weight, targets, *map(torch.tensor, (lengths, exposed))
        )
    assert message in str(error.value)


ERRORS = {
    "unknown divergence 'kl'; known: alpha, forward_kl": dict(divergence="kl"),
    "beta must lie in [0, 1], got 1.5": dict(divergence="jsd", beta=1.5),
    "always zero": dict(divergence="skew_kl", beta=1.0),
    "temperature must be positive and finite, got 0": dict(temperature=0),
    "teacher_temperature must be positive": dict(teacher_temperature=-1.0),
    "token_clip must be positive": dict(token_clip=0.0),
    "unknown reduction 'avg'": dict(reduction="avg"),
    "unknown backend 'cuda'": dict(backend="cuda"),
    "mask must have the leading shape (67,), got (66,)": dict(mask=torch.ones(66)),
    "targets must lie in [0, 1009), got -100 at 1 counted": dict(targets=torch.tensor([-100] + [0] * 66)),
    "student_bias must be [V]": dict(student_bias=torch.zeros(3)),
    "vocabularies differ: 1009 and 1010": dict(teacher_weight=torch.zeros(1010, 48)),
    "teacher_hidden has size 48, but teacher_weight is [V, H] = (1009, 20)": dict(teacher_weight=torch.zeros(1009, 20)),
    "must have the same leading dimensions": dict(teacher_hidden=torch.zeros(66, 48)),
    "student_hidden is torch.float32, teacher_hidden torch.bfloat16": dict(
        teacher_hidden=torch.zeros(67, 48, dtype=torch.bfloat16)
    ),
    "teacher_weight is torch.bfloat16": dict(teacher_weight=torch.zeros(1009, 48, dtype=torch.bfloat16)),
    "narrower than the inputs": dict(logits_dtype=torch.bfloat16),
    "divergence must be a name or a DivergenceTerm, got int": dict(divergence=3),
    "with a leading dimension": dict(student_hidden=torch.zeros(48)),
    "student_weight is on meta": dict(student_weight=torch.zeros(1009, 48, device="meta")),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input_is_refused_with_what_was_wrong(message):
    if "targets must lie" in message and DEVICE.type != "cpu":
        pytest.skip("on a GPU the targets' bounds are the caller's promise")
    pair = make_pair()
    arguments = {
        "student_hidden": pair.student_hidden,
        "student_weight": pair.student_weight,
        "teacher_hidden": pair.teacher_hidden,
        **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
           for k, v in ERRORS[message].items()},
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError)) as error:
        linear_divergence(**arguments)
    assert message in str(error.value)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton can run here")
def test_an_unavailable_backend_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' is not available: "):
        linear_divergence(*make_pair().tensors, backend="triton")


def test_a_view_of_the_head_is_the_shared_head():
    pair = make_pair(dtype=torch.bfloat16)
    view = pair.student_weight.detach()
    assert linear_divergence(*pair.tensors[:3], view).equal(linear_divergence(*pair.tensors[:3]))
