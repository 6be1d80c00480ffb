"""Several views of a teacher: what a mixture is at its ends, what counts in it, what it costs, and what is refused.

The exactness of every divergence and option with views is in `test_exactness`, as for one teacher.
"""

import math

import pytest
import torch

import atesd_kernels as ak
from atesd_kernels import linear_divergence, planning, reference
from atesd_kernels.backends import matmul, torch_chunked, torch_logprobs

from .cases import BACKENDS, DEVICE, Pair, compare, make_pair, relative_l2, size

HEADS = {"one head": (None, None), "own heads": (40, None)}
CAPS = {"no softcap": None, "softcap": 8.0}


def views_of(backend, heads="one head", **options) -> Pair:
    return make_pair(**{**size(backend), "h": 24}, **{"scale": 0.2, "views": HEADS[heads], **options})


def assert_exact(result, bound=1e-5):
    assert result.loss_error <= bound and result.hidden_error <= bound
    assert result.weight_error is None or result.weight_error <= bound
    assert result.bias_error is None or result.bias_error <= bound


def loss_and_gradient(pair, **options):
    hidden = pair.student_hidden.clone().requires_grad_()
    loss = linear_divergence(hidden, *pair.tensors[1:], teacher_mix=pair.teacher_mix, **options)
    loss.sum().backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("kind", (list, tuple))
def test_one_view_is_the_plain_call(kind, shared, softcap, backend):
    pair = make_pair(**size(backend), shared=shared)
    one = Pair(
        *pair.tensors[:2], kind([pair.teacher_hidden]), kind([pair.teacher_weight]), torch.ones(1, device=DEVICE)
    )
    (loss, gradient), (plain, expected) = (
        loss_and_gradient(p, softcap=softcap, reduction="none", backend=backend) for p in (one, pair)
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-10)
    assert relative_l2(gradient, expected) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
def test_a_mixture_of_the_student_with_itself_is_the_student(softcap, backend):
    """However the weights are rounded: they are divided by their sum."""
    pair = views_of(backend)
    mix = torch.tensor([2.1, -0.7, -0.4], device=DEVICE) + torch.tensor([4e-7, 0, 0], device=DEVICE)
    same = Pair(*pair.tensors[:2], [pair.student_hidden] * 3, None, mix)
    loss, gradient = loss_and_gradient(same, softcap=softcap, reduction="none", backend=backend)
    assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_weight_of_one_and_zeros_chooses_a_view_for_each_token(heads, softcap, backend):
    pair = views_of(backend, heads)
    n = len(pair.student_hidden)
    first = torch.arange(n, device=DEVICE) % 2 == 0
    pair.teacher_mix = torch.stack([first, ~first]).float()
    loss, _ = loss_and_gradient(pair, softcap=softcap, reduction="none", backend=backend)
    alone = [
        linear_divergence(*pair.tensors[:2], h, w, softcap=softcap, reduction="none", backend=backend)
        for h, w in zip(pair.teacher_hidden, pair.teacher_weight, strict=True)
    ]
    torch.testing.assert_close(loss, torch.where(first, *alone), rtol=2e-5, atol=1e-9)


MIXES = {
    "average": [0.5, 0.5],
    "extrapolation": [2.5, -1.5],
    "contrast of three": [1.0, 1.0, -1.0],
    "float64": torch.tensor([1.3, -0.3], dtype=torch.float64),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("mix", MIXES)
def test_any_weights_that_sum_to_one_are_exact(mix, per_token, softcap, backend):
    mix = torch.as_tensor(MIXES[mix])
    pair = views_of(backend, views=(None, 40, None)[: len(mix)])
    pair.teacher_mix = mix.to(DEVICE)
    if per_token:  # other weights in every row, also far from these
        other = torch.linspace(0, 3, len(pair.student_hidden), dtype=mix.dtype, device=DEVICE)
        pair.teacher_mix = pair.teacher_mix[:, None] + torch.stack([other, -other, *[0 * other] * (len(mix) - 2)])
    assert_exact(compare(pair, divergence="jsd", softcap=softcap, temperature=1.3, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_are_free_for_views_and_their_weights(backend):
    pair = make_pair(n=6, h=24, v=61, views=(None, 40))
    pair.teacher_mix = pair.teacher_mix[:, None] + torch.tensor([[0.1], [-0.1]], device=DEVICE) * torch.arange(
        6, device=DEVICE
    )
    flat = linear_divergence(*pair.tensors, teacher_mix=pair.teacher_mix, reduction="none", backend=backend)
    shaped = linear_divergence(
        pair.student_hidden.view(2, 3, -1), pair.student_weight, [h.view(2, 3, -1) for h in pair.teacher_hidden],
        pair.teacher_weight, teacher_mix=pair.teacher_mix.view(2, 2, 3), reduction="none", backend=backend,
    )  # fmt: skip
    assert shaped.shape == (2, 3) and shaped.flatten().equal(flat)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("given", ("one for all", "of one view", "of each view", "the student's own"))
def test_biases_mix_with_the_weights(given, heads, softcap, backend):
    pair = views_of(backend, heads)
    student, first, second = torch.randn(3, len(pair.student_weight), generator=torch.Generator().manual_seed(3)).to(
        DEVICE
    )
    teacher = {
        "one for all": first, "of one view": [None, second], "of each view": [first, second], "the student's own": None,
    }[given]  # fmt: skip
    if teacher is first:
        student = None
    options = dict(softcap=softcap, divergence="reverse_kl", backend=backend)
    assert_exact(compare(pair, student_bias=student, teacher_bias=teacher, **options))


TEMPERATURES = ({}, dict(temperature=2.0, teacher_temperature=0.7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", TEMPERATURES, ids=("", "two temperatures"))
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_an_entry_that_one_view_excludes_is_excluded_on_both_sides(divergence, heads, softcap, options, backend):
    """Whatever the view's weight: a negative weight does not make it certain, and none makes it NaN."""
    pair = views_of(backend, heads)
    v = len(pair.student_weight)
    biases = torch.randn(2, v, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    left = torch.ones(v, dtype=torch.bool, device=DEVICE)
    for view, entry in ((0, 3), (1, 7), (1, v - 1)):
        biases[view, entry], left[entry] = -math.inf, False
    options = dict(divergence=divergence, softcap=softcap, backend=backend, **options)
    targets = torch.full((len(pair.student_hidden),), 5, device=DEVICE)
    loss, stats = linear_divergence(
        *pair.tensors, teacher_mix=pair.teacher_mix, teacher_bias=list(biases), targets=targets, return_stats=True,
        **options,
    )  # fmt: skip
    cut = Pair(
        pair.student_hidden, pair.student_weight[left], pair.teacher_hidden,
        [None if w is None else w[left] for w in pair.teacher_weight], pair.teacher_mix,
    )  # fmt: skip
    hidden, short = (pair.student_hidden.clone().requires_grad_() for _ in range(2))
    expected, short_stats = linear_divergence(
        short, *cut.tensors[1:], teacher_mix=cut.teacher_mix, teacher_bias=list(biases[:, left]), targets=targets - 1,
        return_stats=True, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    for field, value, true in zip(stats._fields, stats, short_stats, strict=True):
        assert value.isfinite().all() and torch.allclose(value.float(), true.float(), rtol=1e-4, atol=1e-5), field
    linear_divergence(
        hidden, *pair.tensors[1:], teacher_mix=pair.teacher_mix, teacher_bias=list(biases), **options
    ).backward()
    expected.backward()
    assert relative_l2(hidden.grad, short.grad) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("weight", (1.3, 0.0))
def test_exclusions_of_the_student_alone_and_of_a_view_without_weight(weight, heads, softcap, backend):
    pair = views_of(backend, heads)
    pair.teacher_mix = torch.tensor([1 - weight, weight], device=DEVICE)
    student, first, second = torch.zeros(3, len(pair.student_weight), device=DEVICE)
    student[4], second[9] = -math.inf, -math.inf
    assert_exact(
        compare(
            pair, divergence="jsd", softcap=softcap, student_bias=student, teacher_bias=[first, second], backend=backend
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_masked_token_s_weights_and_states_may_be_anything(heads, softcap, backend):
    pair = views_of(backend, heads)
    n = len(pair.student_hidden)
    mask = torch.arange(n, device=DEVICE) % 3 != 1
    options = dict(mask=mask, softcap=softcap, reduction="none", backend=backend)
    loss, gradient = loss_and_gradient(pair, **options)
    mix = pair.teacher_mix[:, None].expand(2, n)
    for wrong in (0.0, 5.0, math.nan):
        broken = [torch.where(mask[:, None], h, wrong) for h in pair.teacher_hidden]
        again = Pair(*pair.tensors[:2], broken, pair.teacher_weight, torch.where(mask, mix, wrong))
        weight = pair.student_weight.clone().requires_grad_()
        again.student_weight = weight
        other, other_gradient = loss_and_gradient(again, **options)
        assert (other[~mask] == 0).all() and (other_gradient[~mask] == 0).all() and weight.grad.isfinite().all()
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_gradient, gradient)


def test_one_head_without_a_softcap_takes_the_products_of_one_teacher(monkeypatch):
    products, logits = [], matmul.logits
    monkeypatch.setattr(matmul, "logits", lambda h, w, *a, **k: products.append(len(w)) or logits(h, w, *a, **k))
    for backend in BACKENDS:
        pair = views_of(backend, views=(None,) * 5)
        linear_divergence(*pair.tensors[:2], pair.teacher_hidden[0], backend=backend)
        plain, products[:] = sum(products), []
        linear_divergence(*pair.tensors, teacher_mix=pair.teacher_mix, backend=backend)
        assert sum(products) == plain > 0
        products.clear()


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_a_trained_head_and_bias_per_token_survive_a_second_run(heads):
    """`reduction="none"` with a trained head runs the operator again in backward, from what forward has saved."""
    pair = views_of("torch", heads)
    upstream = torch.randn(len(pair.student_hidden), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias = torch.randn(len(pair.student_weight), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    other = [None, bias.flip(0)]
    assert_exact(compare(pair, reduction="none", upstream=upstream, student_bias=bias, teacher_bias=other))


@pytest.mark.parametrize("softcap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("heads", HEADS)
def test_views_pass_gradcheck_in_float64(heads, softcap):
    pair = make_pair(
        n=4, h=5, v=13, scale=0.3, dtype=torch.float64, views=(None, 8) if heads == "own heads" else (None, None)
    )
    leaves = [t.clone().requires_grad_() for t in (pair.student_hidden, pair.student_weight)]
    heads = [pair.student_weight.clone() if w is None else w for w in pair.teacher_weight]

    def loss(hidden, weight):
        return linear_divergence(
            hidden, weight, pair.teacher_hidden, heads, teacher_mix=pair.teacher_mix, divergence="jsd", softcap=softcap
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_the_module_takes_views_too():
    pair = views_of("torch")
    module = ak.LinearDivergence(divergence="jsd", teacher_mix=pair.teacher_mix)
    expected = linear_divergence(*pair.tensors, divergence="jsd", teacher_mix=pair.teacher_mix)
    assert module(*pair.tensors).equal(expected)
    other = torch.tensor([0.2, 0.8], device=DEVICE)
    assert module(*pair.tensors, teacher_mix=other).equal(
        linear_divergence(*pair.tensors, divergence="jsd", teacher_mix=other)
    )


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("heads", HEADS)
def test_torch_compile_traces_a_caller_with_views_without_a_graph_break(heads, reduction):
    pair = views_of("torch", heads)

    def step(hidden, weight, teacher, mix):
        loss = linear_divergence(
            hidden * 1.0, weight, teacher, pair.teacher_weight, teacher_mix=mix, reduction=reduction
        )
        return (loss * loss).sum()

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
        function(hidden, weight, pair.teacher_hidden, pair.teacher_mix).backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(a.norm() > 0 and torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))


def test_autocast_takes_the_difference_before_it_rounds():
    pair = make_pair(views=(None, None), scale=0.007)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        hidden = pair.student_hidden.clone().requires_grad_()
        linear_divergence(hidden, *pair.tensors[1:], teacher_mix=pair.teacher_mix).backward()
    true = pair.student_hidden.double().requires_grad_()
    rounded = pair.student_weight.to(torch.bfloat16)
    reference.linear_divergence(true, rounded, *pair.tensors[2:], teacher_mix=pair.teacher_mix).backward()
    assert (
        relative_l2(hidden.grad, true.grad) <= 0.02
    )  # a student rounded to bf16, but not its distance from the teacher


class Unmixing:
    """A backend of one's own without views."""

    divergence_rows = staticmethod(torch_chunked.divergence_rows)
    divergence_logits = staticmethod(torch_chunked.divergence_logits)
    logprob_rows = staticmethod(torch_logprobs.logprob_rows)


def test_a_backend_of_ones_own_that_does_not_mix_is_refused_by_name():
    pair = views_of("torch")
    name = f"{__name__}:Unmixing"
    linear_divergence(*pair.tensors[:2], pair.teacher_hidden[0], backend=name)
    with pytest.raises(ValueError, match=r"Unmixing' has no divergence_views.*use backend='torch'"):
        linear_divergence(*pair.tensors, teacher_mix=pair.teacher_mix, backend=name)
    assert planning.VIEWS == "divergence_views"


N, H, V = 7, 6, 20
STATES, MIX = torch.zeros(N, H), torch.tensor([1.3, -0.3])
REFUSED = {
    "teacher_hidden is a list of 2 views; pass their weights as teacher_mix": dict(teacher_mix=None),
    "teacher_mix weighs several views, but teacher_hidden is one tensor": dict(teacher_hidden=STATES),
    "teacher_hidden is an empty list": dict(teacher_hidden=[]),
    "teacher_hidden must be a tensor, or a list of them, got dict": dict(teacher_hidden={}),
    "teacher_hidden[1] must be a tensor, got NoneType": dict(teacher_hidden=[STATES, None]),
    "teacher_weight has 3 entries for 2 views": dict(teacher_weight=[None] * 3),
    "teacher_bias has 1 entries for 2 views": dict(teacher_bias=[torch.zeros(V)]),
    "teacher_weight is a list, but teacher_hidden is one tensor": dict(
        teacher_hidden=STATES, teacher_weight=[None], teacher_mix=None
    ),
    "teacher_bias is a list, but teacher_hidden is one tensor": dict(
        teacher_hidden=STATES, teacher_bias=[None], teacher_mix=None
    ),
    "student_hidden and teacher_hidden[1] must have the same leading dimensions": dict(
        teacher_hidden=[STATES, torch.zeros(N + 1, H)]
    ),
    "teacher_hidden[0] torch.bfloat16": dict(teacher_hidden=[STATES.bfloat16(), STATES]),
    "teacher_hidden[1] has size 6, but teacher_weight[1] is [V, H] = (20, 5)": dict(
        teacher_weight=[None, torch.zeros(V, 5)]
    ),
    "vocabularies differ: 20 and 21": dict(teacher_weight=[None, torch.zeros(V + 1, H)]),
    "teacher_weight[1] is torch.bfloat16": dict(teacher_weight=[None, torch.zeros(V, H).bfloat16()]),
    "teacher_bias[0] must be [V] = [20], got (19,)": dict(teacher_bias=[torch.zeros(V - 1), None]),
    "teacher_mix must be a floating tensor, got list": dict(teacher_mix=[1.3, -0.3]),
    "teacher_mix must be a floating tensor, got torch.int64": dict(teacher_mix=torch.tensor([1, 0])),
    "teacher_mix must be [M] = (2,) or [M, ...] = (2, 7), got (3,)": dict(teacher_mix=torch.ones(3)),
    "got (7, 2)": dict(teacher_mix=torch.ones(N, 2)),
    "teacher_mix needs a gradient": dict(teacher_mix=MIX.clone().requires_grad_()),
    "teacher_mix is on meta": dict(teacher_mix=MIX.to("meta")),
    "got a sum of nan": dict(teacher_mix=torch.tensor([math.nan, 1.0])),
    "teacher_mix must be finite and sum to 1 over the views within 1e-06, got a sum of inf": dict(
        teacher_mix=torch.tensor([math.inf, 1.0])
    ),
    "got a sum of 1.1": dict(teacher_mix=torch.tensor([0.5, 0.6], dtype=torch.float64)),
    "keep it in float32": dict(teacher_mix=MIX.bfloat16()),
    "got a sum of 0.75": dict(
        teacher_mix=torch.tensor([1.0] * (N - 1) + [0.5]) * torch.tensor([[0.5], [0.5]])
        + torch.tensor([[0.0] * (N - 1) + [0.25], [0.0] * N])
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_views_are_refused_with_what_was_wrong(message):
    if ("got a sum" in message or "keep it in float32" in message) and DEVICE.type != "cpu":
        pytest.skip("on a GPU the sum is the caller's promise")

    def here(x):
        if isinstance(x, list):
            return [here(y) for y in x]
        return x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x

    arguments = {
        "student_hidden": STATES, "student_weight": torch.zeros(V, H), "teacher_hidden": [STATES, STATES],
        "teacher_mix": MIX, **REFUSED[message],
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError)) as error:
        linear_divergence(**{name: here(x) for name, x in arguments.items()})
    assert message in str(error.value)


def test_a_sum_within_a_millionth_of_one_is_taken():
    pair = views_of("torch")
    near = pair.teacher_mix.double() + torch.tensor([9e-7, 0], device=DEVICE)
    pair.teacher_mix = near
    assert_exact(compare(pair))
    pair.teacher_mix = near + torch.tensor([2e-6, 0], device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="sum to 1"):
            compare(pair)
