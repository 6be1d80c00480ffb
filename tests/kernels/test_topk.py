"""`linear_topk_divergence`: exact on the K + 1 entries, a lower bound of the whole divergence, on every backend."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

import atesd_kernels as ak
from atesd_kernels import linear_divergence, linear_topk_divergence, planning, reference
from atesd_kernels.backends import torch_topk, tuning
from atesd_kernels.divergences import get_divergence
from atesd_kernels.spec import TopkSpec

from .cases import BACKENDS, BF16_BACKENDS, DEVICE, DIVERGENCES, make_pair, relative_l2, size
from .test_autograd import SPEC
from .topk_cases import TAILS, compare, known, teacher

SCALES = {1e-4: 0.007, 1e-2: 0.07, 1e-1: 0.22}  # mean KL of the whole distributions -> make_pair's scale
GRADIENT = 1e-5
# On "triton" the sweep that sums the rest is fp32; on "torch" it is as wide as the logits. A near rest shows it.
LOSS = {b: 1e-6 if b == "torch" else 1e-5 for b in BACKENDS}
ROUNDING = 2**-23  # of a log-probability whose sum over the vocabulary is fp32


def assert_exact(result, backend, mass=0.0):
    """`mass`: of the listed entries, where their terms cancel and leave a loss that is small beside them."""
    assert result.loss_error <= LOSS[backend] + ROUNDING * mass / result.loss
    for error in (result.hidden_error, result.weight_error, result.bias_error):
        assert error is None or error <= GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", SCALES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd"))
def test_fp32_gradients_are_exact_however_near_the_teacher(divergence, tail, kl, backend):
    case = known(backend, scale=SCALES[kl])
    assert_exact(compare(case, divergence=divergence, beta=0.3, tail=tail, temperature=1.0, backend=backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_works_on_the_entries(divergence, backend):
    for options in ({}, {"trained_head": False, "temperature": 1.3}):
        assert_exact(compare(known(backend), divergence=divergence, beta=0.3, backend=backend, **options), backend)


@pytest.mark.parametrize("backend", BF16_BACKENDS)
@pytest.mark.parametrize("kl", SCALES)
@pytest.mark.parametrize("tail", TAILS)
def test_bf16_gradients_keep_their_direction_when_teacher_and_student_nearly_agree(tail, kl, backend):
    result = compare(known(backend, scale=SCALES[kl], dtype=torch.bfloat16), tail=tail, backend=backend)
    assert result.hidden_error <= 5e-3 and result.loss_error <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_fp16_gradients_survive_the_end_of_the_fp16_range(tail, backend):
    case = known(backend, scale=SCALES[1e-2], dtype=torch.float16)
    result = compare(case, tail=tail, upstream=torch.tensor(4096.0), backend=backend)
    assert max(result.hidden_error, result.weight_error) <= 2e-3


OPTIONS = {
    "softcap": dict(softcap=8.0),
    "bias": dict(student_bias="bias"),
    "softcap, bias, temperature": dict(softcap=8.0, student_bias="bias", temperature=1.3),
    "mask": dict(mask="mask"),
    "mask and weights": dict(mask="mask", token_weight="weight", num_tokens=1000),
    "sum": dict(reduction="sum"),
    "small chunks": dict(chunk_bytes=1009 * 8 * 10),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_exact(name, tail, backend):
    shape = size(backend)
    g = torch.Generator().manual_seed(5)
    named = {
        "bias": torch.randn(shape["v"], generator=g).to(DEVICE),
        "mask": (torch.arange(shape["n"]) % 5 % 3 != 1).to(DEVICE),
        "weight": torch.rand(shape["n"], generator=g).to(DEVICE),
    }
    options = {k: named.get(o, o) if isinstance(o, str) else o for k, o in OPTIONS[name].items()}
    case = known(backend, options=options)
    cancels = tail == "ignore" and backend != "torch" and "softcap" in options
    mass = case.logprobs.exp().where(case.ids >= 0, 0).sum(1).mean().item() if cancels else 0.0
    assert_exact(compare(case, tail=tail, backend=backend, **options), backend, mass)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained_head", (False, True))
@pytest.mark.parametrize("tail", TAILS)
def test_any_upstream_gradient_per_token_is_exact(tail, trained_head, backend):
    case = known(backend)
    upstream = torch.randn(len(case.ids), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = dict(reduction="none", upstream=upstream, trained_head=trained_head, tail=tail, backend=backend)
    assert_exact(compare(case, **options), backend)


@pytest.mark.parametrize("tail", TAILS)
def test_the_hand_written_derivative_passes_gradcheck(tail):
    pair = make_pair(n=4, h=5, v=13, scale=0.3, dtype=torch.float64, shared=False)
    logprobs, ids = teacher(pair, {}).topk(4)
    ids[1, 2:] = -1
    bias = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(ids.device)
    leaves = [t.clone().requires_grad_() for t in (pair.student_hidden, pair.student_weight, bias)]
    for divergence in DIVERGENCES:
        options = dict(divergence=divergence, beta=0.3, tail=tail, temperature=1.3, softcap=4.0)
        assert gradcheck(
            lambda h, w, b, o=options: linear_topk_divergence(h, w, ids, logprobs, student_bias=b, **o), leaves
        )


# What the tails mean


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_where_the_ids_cover_the_vocabulary_it_is_the_whole_divergence(divergence, backend):
    pair = make_pair(n=3, h=16, v=40, scale=0.07, shared=False)
    ids = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)]).to(DEVICE)
    logprobs = teacher(pair, {}).gather(1, ids)
    hidden, true = pair.student_hidden.clone().requires_grad_(), pair.student_hidden.double().requires_grad_()
    options = dict(divergence=divergence, beta=0.3)
    loss = linear_topk_divergence(hidden, pair.student_weight, ids, logprobs, backend=backend, **options)
    loss.backward()
    expected = reference.linear_divergence(true, *pair.tensors[1:], **options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_l2(hidden.grad, true.grad) <= GRADIENT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", (None, 8.0))
def test_ids_that_cover_what_the_student_can_say_leave_no_rest(softcap, backend):
    """A padded head: 30 tokens, and 10 entries at -inf which nobody lists."""
    pair = make_pair(n=3, h=16, v=40, scale=0.07, shared=False)
    bias = torch.zeros(40, device=DEVICE)
    bias[30:] = -torch.inf
    options = dict(student_bias=bias, softcap=softcap)
    ids = torch.arange(30, device=DEVICE).repeat(3, 1)
    logprobs = teacher(pair, options)[:, :30]
    hidden, weight, true = (t.clone().requires_grad_() for t in (*pair.tensors[:2], pair.student_hidden.double()))
    loss = linear_topk_divergence(hidden, weight, ids, logprobs, backend=backend, **options)
    loss.backward()
    bias_t = torch.zeros(30, device=DEVICE)
    expected = reference.linear_divergence(
        true, pair.student_weight[:30], pair.teacher_hidden, pair.teacher_weight[:30], softcap=softcap,
        student_bias=bias_t, teacher_bias=bias_t,
    )  # fmt: skip
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_l2(hidden.grad, true.grad) <= GRADIENT and not weight.grad[30:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_is_a_lower_bound_that_rises_with_k_and_is_never_negative(divergence, backend):
    pair = make_pair(**size(backend), scale=0.22, shared=False)
    p = teacher(pair, {})
    options = dict(divergence=divergence, beta=0.3, reduction="none")
    values = [
        linear_topk_divergence(*pair.tensors[:2], ids, logprobs, backend=backend, **options)
        for logprobs, ids in (p.topk(k) for k in (1, 4, 32, 128))
    ]
    whole = reference.linear_divergence(*pair.tensors, **options)
    for few, more in zip(values, [*values[1:], whole], strict=True):
        assert (few >= 0).all() and (few <= more * (1 + 1e-4) + 1e-7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_student_that_agrees_costs_nothing_and_never_less(dtype, divergence, backend):
    pair = make_pair(**size(backend), scale=0.0)
    logits = reference.logits(pair.student_hidden, pair.student_weight)
    for k in (1, 12, logits.shape[1]):
        logprobs, ids = logits.log_softmax(-1).topk(k)
        tensors = (*(t.to(dtype) for t in pair.tensors[:2]), ids, logprobs.to(dtype).clamp_max(0))
        if tensors[3].double().exp().sum(1).max() > 1 + 1e-4:
            continue  # fp16 log-probs of everything sum to more than one
        value = linear_topk_divergence(*tensors, divergence=divergence, reduction="none", backend=backend)
        assert (value >= 0).all() and (value < 2e-3).all()


def test_ignoring_the_tail_can_give_a_negative_loss_and_no_other_tail_does():
    """The student has more of its mass on the listed ids than the teacher: what users of a plain sum run into."""
    hidden, head = torch.zeros(1, 4, device=DEVICE), torch.zeros(50, 4, device=DEVICE)
    bias = torch.zeros(50, device=DEVICE)
    bias[:2] = 4.0
    ids, logprobs = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0.2, 0.2]], device=DEVICE).log()
    value = {t: linear_topk_divergence(hidden, head, ids, logprobs, student_bias=bias, tail=t).item() for t in TAILS}
    q = math.exp(4) / (2 * math.exp(4) + 48)
    assert value["ignore"] == pytest.approx(0.4 * math.log(0.2 / q)) and value["ignore"] < 0
    assert value["bucket"] == pytest.approx(0.4 * math.log(0.2 / q) + 0.6 * math.log(0.6 / (1 - 2 * q)), rel=1e-5)
    assert value["renormalise"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_rest_is_the_sum_of_its_entries_not_one_minus_a_sum(backend):
    """The student's rest is 1e-12: fp32 cannot tell 1 minus it from 1."""
    hidden, head = torch.zeros(1, 4, device=DEVICE), torch.zeros(40, 4, device=DEVICE)
    bias = torch.full((40,), math.log(1e-12 / 39), device=DEVICE)
    bias[7] = 0.0
    ids, logprobs = torch.tensor([[7]], device=DEVICE), torch.tensor([[0.5]], device=DEVICE).log()
    bias.requires_grad_()
    options = dict(student_bias=bias, divergence="forward_kl", backend=backend)
    value = linear_topk_divergence(hidden, head, ids, logprobs, **options)
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-12), rel=1e-5)
    # the rest's half of the teacher's mass pulls every entry outside the ids up alike
    assert torch.allclose(bias.grad[8:], torch.full((32,), -0.5 / 39, device=DEVICE), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_s_rest_is_at_least_a_millionth(backend):
    hidden, head = torch.zeros(1, 4, device=DEVICE), torch.zeros(40, 4, device=DEVICE)
    ids = torch.tensor([[7]], device=DEVICE)
    for mass in (1 - 1e-9, 1.0, 1 + 5e-5):  # a server rounds to either side
        logprobs = torch.tensor([[mass]], dtype=torch.float64, device=DEVICE).log()
        value = linear_topk_divergence(hidden, head, ids, logprobs, divergence="reverse_kl", backend=backend).item()
        assert value == pytest.approx(math.log(1 / 40) / 40 + 39 / 40 * math.log(39 / 40 / 1e-6), rel=1e-4)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_order_of_the_entries_change_nothing(backend, tail):
    pair = make_pair(**size(backend), scale=0.22, shared=False)
    logprobs, ids = teacher(pair, {}).topk(5)
    n = len(ids)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    padded = torch.cat([ids, ids.new_full((n, 4), -1)], 1)[:, order]
    filled = torch.cat([logprobs, logprobs.new_full((n, 4), torch.nan)], 1)[:, order]  # padding holds anything
    options = dict(tail=tail, reduction="none", backend=backend, return_stats=True)
    few, stats = linear_topk_divergence(*pair.tensors[:2], ids, logprobs, **options)
    more, padded_stats = linear_topk_divergence(*pair.tensors[:2], padded.int(), filled, **options)
    assert torch.allclose(few, more, rtol=1e-5)
    assert torch.allclose(stats.teacher_entropy, padded_stats.teacher_entropy)
    assert stats.top1_agree.equal(padded_stats.top1_agree)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_listed_entries_costs_nothing_and_has_no_gradient(backend, tail):
    case = known(backend)
    case.ids[1] = -1
    hidden = case.student_hidden.clone().requires_grad_()
    value, stats = linear_topk_divergence(
        hidden, *case.tensors[1:], tail=tail, reduction="none", backend=backend, return_stats=True
    )
    value.sum().backward()
    assert value[1] == 0 and not hidden.grad[1].any() and hidden.grad[0].any()
    assert stats.teacher_entropy[1] == 0 and not stats.top1_agree[1]


def test_renormalising_does_not_ask_for_normalised_log_probabilities():
    """Log-probs divided by a temperature differ from the softmax at that temperature by a constant."""
    pair = make_pair(scale=0.22, shared=False)
    logits, ids = reference.logits(pair.teacher_hidden, pair.teacher_weight).topk(6)
    tensors = (*pair.tensors[:2], ids)
    values = [
        linear_topk_divergence(*tensors, z, tail="renormalise")
        for z in (logits, logits.log_softmax(-1), logits - logits.logsumexp(-1, keepdim=True) + 3)
    ]
    assert torch.allclose(values[0], values[1]) and torch.allclose(values[0], values[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_given_logits_have_the_loss_and_gradient_of_the_same_logits_from_a_head(dtype, tail, backend):
    case = known(backend, dtype=dtype)
    logits = (case.student_hidden @ case.student_weight.T).contiguous()
    mask = torch.arange(len(logits), device=DEVICE) != 1
    options = dict(divergence="jsd", beta=0.3, tail=tail, temperature=1.3, softcap=20.0, mask=mask)
    z, true = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, stats = ak.topk_divergence(
        z, case.ids, case.logprobs, backend=backend, return_stats=True, targets=case.ids[:, 0].clamp_min(0), **options
    )
    head = torch.eye(logits.shape[1], dtype=torch.float64, device=DEVICE)
    expected = reference.linear_topk_divergence(true, head, case.ids, case.logprobs, **options)
    for value in (loss, expected):
        (value * 4096).backward()  # as a loss scaler does: an fp16 gradient underflows without
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_l2(z.grad, true.grad) <= (1e-5 if dtype == torch.float32 else 2e-3)
    assert not z.grad[1].any() and (stats.student_logprob[mask] < 0).all()
    module = ak.TopkDivergence(**options, backend=backend)
    assert module(logits, case.ids, case.logprobs).equal(loss.detach())


# Clips, statistics, divergences of one's own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd"))
def test_clips_bound_terms_and_tokens_and_remove_their_gradient(divergence, tail, backend):
    """The rest is a term as well. Clips lie in gaps, as a clip's gradient jumps where a term equals it."""
    case = known(backend, scale=0.22)
    log_q = reference.logits(case.student_hidden, case.student_weight).log_softmax(-1)
    q, p = reference.topk_entries(log_q, case.ids, case.logprobs, with_rest=tail == "bucket")
    if tail == "renormalise":
        q, p = q.log_softmax(-1), p.log_softmax(-1)
    terms = get_divergence(divergence, 0.3).term(p, q, 0.3)[0].nan_to_num(-1.0)  # NaN: padding
    tokens = linear_topk_divergence(*case.tensors, divergence=divergence, beta=0.3, tail=tail, reduction="none")
    clips = [dict(entry_clip=in_a_gap(terms[terms > 0], share)) for share in (0.3, 0.9)]
    if (tokens > 0).sum() > 1:
        clips.append(dict(token_clip=in_a_gap(tokens[tokens > 0].double(), 0.5)))
    for clip in clips:
        hidden, true = case.student_hidden.clone().requires_grad_(), case.student_hidden.double().requires_grad_()
        options = dict(divergence=divergence, beta=0.3, tail=tail, reduction="none", **clip)
        value = linear_topk_divergence(hidden, *case.tensors[1:], backend=backend, **options)
        expected = reference.linear_topk_divergence(true, *case.tensors[1:], **options)
        value.sum().backward(), expected.sum().backward()
        assert (value - expected).abs().max() <= 1e-6 and (value < tokens - 1e-7).any()
        assert relative_l2(hidden.grad, true.grad) <= 1e-4


def in_a_gap(values: torch.Tensor, share: float) -> float:
    ordered = values.flatten().sort().values
    middle = min(int(share * len(ordered)), len(ordered) - 2)
    around = ordered[max(0, middle - 3) : middle + 4]
    widest = (around[1:] - around[:-1]).argmax()
    return around[widest : widest + 2].mean().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clipped_rest_has_no_gradient_of_its_own(backend):
    """All of the difference is in the rest: a clip below its term leaves the loss without a gradient."""
    head = torch.eye(4, device=DEVICE)
    hidden = torch.tensor([[0.0, 0.0, 3.0, 1.0]], device=DEVICE, requires_grad=True)
    ids, logprobs = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[1e-3, 1e-3]], device=DEVICE).log()
    linear_topk_divergence(hidden, head, ids, logprobs, entry_clip=1e-4, backend=backend).backward()
    q = hidden.detach().softmax(1)
    listed = -torch.full((2,), 1e-3, device=DEVICE)  # u of the two listed terms, which are negative: not clipped
    expected = torch.cat([listed, listed.new_zeros(2)]) - q * listed.sum()
    assert torch.allclose(hidden.grad, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"softcap": 30.0, "temperature": 1.2}, {"tail": "renormalise"}))
def test_statistics_are_the_student_s_and_the_bucketed_teacher_s(options, backend):
    case = known(backend, scale=0.5, options=options)
    n, v = len(case.ids), len(case.student_weight)
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[: n // 2 + 1] = case.ids[: n // 2 + 1, 1]
    loss, stats = linear_topk_divergence(
        *case.tensors, targets=targets, return_stats=True, reduction="none", backend=backend, entry_clip=0.01, **options
    )
    scaling = {k: o for k, o in options.items() if k != "tail"}
    s = reference.logits(case.student_hidden, case.student_weight, **scaling)
    true = reference.token_stats(s, s, targets)
    for name in ("student_entropy", "student_logprob", "student_top1_prob"):
        assert relative_l2(getattr(stats, name), getattr(true, name)) <= 1e-5, name
    _, p = reference.topk_entries(s.log_softmax(-1), case.ids, case.logprobs, with_rest="tail" not in options)
    assert relative_l2(stats.teacher_entropy, torch.special.entr(p.softmax(-1)).sum(-1)) <= 1e-5
    assert stats.top1_agree.equal(s.argmax(-1) == case.ids[:, 0])
    hit = case.ids == targets[:, None]
    assert stats.teacher_logprob.isnan().equal(~hit.any(1)) and hit.any() and not hit.any(1).all()
    assert torch.equal(stats.teacher_logprob[hit.any(1)], case.logprobs[hit])
    divergence = reference.linear_topk_divergence(*case.tensors, reduction="none", **options)
    assert relative_l2(stats.divergence, divergence) <= 1e-4 and not torch.allclose(stats.divergence, loss)


def test_statistics_without_targets_are_none_and_masked_tokens_zero():
    case = known("torch")
    mask = torch.arange(67, device=DEVICE) % 2 == 0
    _, stats = linear_topk_divergence(*case.tensors, mask=mask, return_stats=True)
    assert stats.student_logprob is None and stats.teacher_logprob is None
    assert (stats.student_entropy[~mask] == 0).all() and (stats.student_entropy[mask] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_of_ones_own_needs_no_triton_function(backend):
    def squared(log_p, log_q, beta):
        p, q = log_p.exp(), log_q.exp()
        return (p - q) ** 2, 2 * q * (q - p)

    term = ak.DivergenceTerm("squared over the top k", squared)
    for tail in TAILS:
        assert_exact(compare(known(backend, scale=0.3), divergence=term, tail=tail, backend=backend), backend)


# Where it runs, and what is refused


def test_leading_shapes_are_free_and_the_module_is_the_function():
    case = known("torch", n=12)
    flat = linear_topk_divergence(*case.tensors, reduction="none")
    shaped = [t.view(2, 3, 2, -1) if t is not case.student_weight else t for t in case.tensors]
    value = ak.LinearTopkDivergence(reduction="none")(*shaped, mask=torch.ones(2, 3, 2, device=DEVICE))
    assert value.shape == (2, 3, 2) and value.flatten().equal(flat)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_may_hold_anything(backend):
    case = known(backend)
    mask = torch.arange(len(case.ids), device=DEVICE) % 2 == 0
    hidden, weight = case.student_hidden.clone().requires_grad_(), case.student_weight.clone().requires_grad_()
    clean = linear_topk_divergence(*case.tensors, mask=mask, backend=backend)
    case.ids[~mask], case.logprobs[~mask] = 1 << 40, torch.nan
    hidden.data[~mask] = torch.nan
    loss = linear_topk_divergence(hidden, weight, case.ids, case.logprobs, mask=mask, backend=backend)
    loss.backward()
    assert torch.allclose(loss, clean, rtol=1e-6)
    assert hidden.grad[mask].any() and not hidden.grad[~mask].any() and weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_hidden_states_give_a_non_finite_loss_and_no_tokens_a_loss_of_zero(backend):
    case = known(backend)
    for value in (torch.nan, torch.inf):
        broken = case.student_hidden.clone()
        broken[1, 0] = value
        assert not linear_topk_divergence(broken, *case.tensors[1:], backend=backend).isfinite()
    hidden = case.student_hidden[:0].clone().requires_grad_()
    loss = linear_topk_divergence(hidden, case.student_weight, case.ids[:0], case.logprobs[:0], backend=backend)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, case.student_hidden.shape[1])


def test_bf16_log_probabilities_of_a_server_are_taken_as_they_are():
    case = known("torch", scale=0.5)
    wide, narrow = (
        linear_topk_divergence(*case.tensors[:3], case.logprobs.bfloat16().to(dtype))
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert narrow.equal(wide)


def test_a_caller_compiled_in_one_graph_gets_the_same_gradient():
    case = known("torch")
    gradients = []
    for compile_ in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        hidden = case.student_hidden.clone().requires_grad_()
        step = compile_(lambda h: linear_topk_divergence(h * 2, *case.tensors[1:], divergence="jsd", softcap=20.0) * 3)
        step(hidden).backward()
        gradients.append(hidden.grad)
    assert gradients[0].norm() > 0 and torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="opcheck compares with the CPU implementation")
@pytest.mark.parametrize("weighted", (False, True))
def test_the_operator_keeps_torch_s_rules(weighted):
    case = known("torch", n=5, h=8, v=30, k=4)
    spec = TopkSpec(**{**vars(SPEC), "weighted": weighted}, tail="bucket").encode()
    hidden = case.student_hidden.clone().requires_grad_()
    arguments = (hidden, case.student_weight, None, case.ids, case.logprobs, None, None, None, spec)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ak.ops.linear_topk_divergence_op, arguments, test_utils=tests)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
@pytest.mark.parametrize("k", (8, 512))
def test_peak_memory_is_the_chunk_and_the_results_whatever_the_tokens(k, monkeypatch, peak_bytes):
    monkeypatch.setattr(planning, "CPU_BLOCK_COLUMNS", 500)
    monkeypatch.setattr(planning, "CPU_TILE_ROWS", 25)
    chunk = 8 * 3000 * 50
    for tokens in (100, 1000):
        case = known("torch", k=k, n=tokens, h=16, v=3000)
        hidden = case.student_hidden.requires_grad_()

        def run(case=case, hidden=hidden):
            hidden.grad = None
            linear_topk_divergence(*case.tensors, chunk_bytes=chunk).backward()

        # the check of the ids sorts them: ids, their order and copies of the log-probs
        results = hidden.numel() * 4 + 200 * tokens + 34 * case.ids.numel()
        assert peak_bytes(run) - results < 1.3 * chunk, (tokens, k)


ERRORS = {
    "unknown tail 'drop'; known: 'bucket', 'renormalise', 'ignore'": dict(tail="drop"),
    "unknown divergence 'kl'": dict(divergence="kl"),
    "temperature must be positive": dict(temperature=0.0),
    "entry_clip must be finite and not negative": dict(entry_clip=-1.0),
    "unknown reduction 'avg'": dict(reduction="avg"),
    "teacher_ids must be [..., K] with the leading shape (67,) and K > 0, got (66, 12)": dict(
        teacher_ids=torch.zeros(66, 12).long()
    ),
    "and K > 0, got (67, 0)": dict(teacher_ids=torch.zeros(67, 0).long(), teacher_logprobs=torch.zeros(67, 0)),
    "teacher_ids is (67, 12), teacher_logprobs (67, 11)": dict(teacher_logprobs=torch.zeros(67, 11)),
    "teacher_ids must be integers, got torch.float32": dict(teacher_ids=torch.zeros(67, 12)),
    "teacher_logprobs has dtype torch.int64": dict(teacher_logprobs=torch.zeros(67, 12).long()),
    "teacher_ids must be a tensor, got list": dict(teacher_ids=[[1, 2]]),
    "student_bias must be [V]": dict(student_bias=torch.zeros(3)),
    "backend 'atesd_kernels.backends.own:no' cannot be imported": dict(backend="atesd_kernels.backends.own:no"),
}
VALUES = {
    "teacher_ids must lie in [0, 1009), or be -1 for padding, got 1009 at 1 place(s)": dict(ids=1009),
    "or be -1 for padding, got -100": dict(ids=-100),
    "teacher_ids must not repeat within a token, got 3 twice, and 1 counted token(s)": dict(ids=3),
    "teacher_logprobs must be log-probabilities, got nan at 1": dict(logprobs=torch.nan),
    "got a mass of 2.": dict(logprobs=0.7),
}


def called(**changed):
    case = known("torch", scale=0.2)
    names = ("student_hidden", "student_weight", "teacher_ids", "teacher_logprobs")
    arguments = dict(zip(names, case.tensors, strict=True))
    return linear_topk_divergence(
        **{**arguments, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changed.items()}}
    )


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input_is_refused_with_what_was_wrong(message):
    with pytest.raises((ValueError, TypeError)) as error:
        called(**ERRORS[message])
    assert message in str(error.value)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU values are the caller's promise")
@pytest.mark.parametrize("message", VALUES)
def test_bad_values_of_counted_tokens_are_refused_and_of_masked_ones_not(message):
    case = known("torch", scale=0.2)
    change = VALUES[message]
    case.ids[5, 2] = change.get("ids", case.ids[5, 2])
    case.ids[5, 3] = 3 if change.get("ids") == 3 else case.ids[5, 3]
    case.logprobs[5, 2] = change.get("logprobs", case.logprobs[5, 2])
    with pytest.raises(ValueError) as error:
        linear_topk_divergence(*case.tensors)
    assert message in str(error.value)
    mask = torch.arange(67) != 5
    assert linear_topk_divergence(*case.tensors, mask=mask).isfinite()


def test_a_backend_of_ones_own_that_has_no_such_function_is_refused_by_name(monkeypatch):
    module = ModuleType("my_backends")
    functions = dict.fromkeys(planning.FUNCTIONS, print)
    module.without, module.with_topk = (
        SimpleNamespace(**functions),
        SimpleNamespace(**functions, topk_rows=torch_topk.topk_rows),
    )
    monkeypatch.setitem(sys.modules, "my_backends", module)
    with pytest.raises(ValueError, match="backend 'my_backends:without' lacks topk_rows; see atesd_kernels"):
        called(backend="my_backends:without")
    assert called(backend="my_backends:with_topk").equal(called(backend="torch"))


def test_a_forward_mode_derivative_and_a_second_one_are_refused():
    case = known("torch", n=3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda h: linear_topk_divergence(h, *case.tensors[1:]), (case.student_hidden,), (case.student_hidden,)
        )
    hidden = case.student_hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_topk_divergence(hidden, *case.tensors[1:]), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_it_is_near_the_whole_divergence_with_few_entries_of_a_peaked_teacher():
    """What K leaves out: with 64 of 1,009 entries the bucket keeps most of the divergence."""
    pair = make_pair(scale=0.22, shared=False)
    sharp = {"temperature": 0.3}
    whole = linear_divergence(*pair.tensors, **sharp).item()
    shares = []
    for k in (4, 16, 64):
        logprobs, ids = teacher(pair, sharp).topk(k)
        shares.append(linear_topk_divergence(*pair.tensors[:2], ids, logprobs, **sharp).item() / whole)
    assert shares == sorted(shares) and shares[0] > 0.5 and shares[2] > 0.95


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_several_programs_share_a_row_and_k_may_exceed_a_block(backend, monkeypatch):
    monkeypatch.setattr(tuning, "num_processors", lambda device: 12)
    assert_exact(compare(known(backend, k=150, v=2100, scale=0.2), backend=backend), backend)
