"""The Triton backends on small, odd shapes against float64, as `pytest -m gpu` runs them on a GPU.

`make sanitize` runs this file without one: an interpreter executes what Triton's compiler produces and fails a test at
the kernel's line for an out-of-bounds access, a race between programs or a read of unwritten memory. Shapes are small
because that takes seconds per launch; every launch has several programs, and few sizes are multiples of a block.
"""

from __future__ import annotations

import sys

import pytest
import torch

from atesd_kernels import divergence, exposure_logprobs, linear_divergence, linear_logprobs, reference
from atesd_kernels.backends import matmul, triton_exposure, tuning
from atesd_kernels.tools import compile_only
from atesd_kernels.topk import linear_topk_divergence

from .thread_ranks import ThreadRanks

SANITIZED = "ttsem" in sys.modules
COMPILED_ONLY = "tests.kernels.compiled_only" in sys.modules  # that plugin
NO_GPU = SANITIZED or COMPILED_ONLY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (NO_GPU or torch.cuda.is_available()), reason="needs a GPU, or `make sanitize`"),
]
DEVICE = "cpu" if COMPILED_ONLY else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("triton",)
DIVERGENCES = (
    "forward_kl", "reverse_kl", "jsd", "jeffreys", "skew_kl", "skew_reverse_kl", "total_variation", "alpha",
)  # fmt: skip
BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
LOSS_BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 1e-3}  # five rows average less out than 67


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch):
    """Small blocks and an imagined number of processors, so that rows are split over programs at these sizes."""
    tile = tuning.TileConfig(16, 64, 32, 4, 2)
    monkeypatch.setattr(tuning, "row_config", lambda device, vocab: tuning.RowConfig(128, 4))
    monkeypatch.setattr(tuning, "tile_config", lambda device, dtype: tile)
    monkeypatch.setattr(tuning, "num_processors", lambda device: 3)
    if SANITIZED:  # its tensors lie on the CPU, where no GEMM widens its output
        monkeypatch.setattr(matmul, "torch", compile_only.WideTorch())


def pair(dtype, *, n=5, h=33, v=301, scale=0.05, shared=True, common=0.0):
    """With `common`, all logit differences of a row share a part, as large as `common` times their spread."""
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(1, h, generator=g)
    weight = (torch.randn(v, h, generator=g) * 0.3 + 0.3 * common / h**0.5 * direction).to(dtype)
    student = torch.randn(n, h, generator=g).to(dtype)
    teacher = (student.float() + scale * (torch.randn(n, h, generator=g) + (common != 0) * direction)).to(dtype)
    weight_t = None if shared else (weight.float() + 0.03 * scale * torch.randn(v, h, generator=g)).to(dtype)
    return student, weight, teacher, weight_t


def views(dtype, size=None):
    """Two views of a teacher for `check`, the first with a head of its own if that has a `size`; and their weights."""
    student, weight, teacher, _ = pair(dtype)
    g = torch.Generator().manual_seed(4)
    other = (student.float() + 0.05 * torch.randn(student.shape, generator=g)).to(dtype)
    head = None
    if size is not None:
        teacher = torch.cat([teacher, torch.randn(5, size - 33, generator=g).to(dtype)], 1)
        head = torch.cat([weight.float(), 0.01 * torch.randn(301, size - 33, generator=g)], 1).to(dtype)
    return (student, weight, [teacher, other], [head, None]), torch.tensor([1.3, -0.3])


def on_gpu(x):
    if isinstance(x, list):
        return [on_gpu(y) for y in x]
    return x.to(DEVICE, copy=True) if isinstance(x, torch.Tensor) else x


def in_float64(x):
    if isinstance(x, list):
        return [in_float64(y) for y in x]
    return None if x is None else x.double().clone()


def relative(value, expected) -> float:
    return ((value.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(dtype, tensors, backend, trained_head=True, upstream=None, stats=False, loss_bound=None, **options) -> None:
    """Loss and gradients against the oracle on the same rounded inputs."""
    results = []
    for oracle in (True, False):
        h, w, t, w_t = ((in_float64(x) if oracle else on_gpu(x)) for x in tensors)
        h, w = h.requires_grad_(), w.requires_grad_(trained_head)
        if oracle:
            known = {k: v for k, v in options.items() if k not in ("chunk_bytes", "logits_dtype", "targets")}
            loss = reference.linear_divergence(h, w, t, w_t, **known)
        else:
            known = {k: on_gpu(v) for k, v in options.items()}
            loss = linear_divergence(h, w, t, w_t, backend=backend, return_stats=stats, **known)
            loss = loss[0] if stats else loss
        scale = 1.0 if upstream is None else upstream.to(loss.dtype)
        (loss * (scale if oracle else on_gpu(scale))).sum().backward()
        results.append((loss.detach(), h.grad, w.grad))
    (true_loss, *true_grads), (loss, *grads) = results
    assert relative(loss, true_loss) <= (loss_bound or LOSS_BOUND[dtype])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        if true_grad is not None:
            assert relative(grad, true_grad) <= BOUND[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_exact_in_bf16(divergence, backend):
    check(torch.bfloat16, pair(torch.bfloat16), backend, divergence=divergence, beta=0.3, temperature=1.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_both_kinds_of_head(dtype, shared, backend):
    check(dtype, pair(dtype, shared=shared), backend, divergence="forward_kl")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_read_through_a_tensor_descriptor(dtype, monkeypatch):
    """TMA, on a GPU that has it: 301 tokens and 40 hidden units end inside a block."""
    if not NO_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs sm_90")
    tile = tuning.TileConfig(16, 64, 32, 4, 2, tma=True)
    monkeypatch.setattr(tuning, "tile_config", lambda device, dtype: tile)
    hidden, weight = pair(dtype, h=40)[:2]
    assert triton_exposure.head_operand(on_gpu(weight), tile)[1] is None
    arguments = (hidden[None], weight, torch.arange(5)[None] * 71, torch.tensor([5]), torch.tensor([2]))
    value = exposure_logprobs(*map(on_gpu, arguments), backend="triton")
    assert relative(value, reference.linear_logprobs(*arguments[:3])[:, 2:].mean(1)) <= LOSS_BOUND[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (0.007, 0.07, 0.22, 0.75))
def test_bf16_keeps_the_gradient_from_a_kl_of_1e_minus_4_to_1(scale, backend):
    check(torch.bfloat16, pair(torch.bfloat16, scale=scale), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_all_logit_differences_of_a_row_share_is_not_rounded(backend):
    check(torch.bfloat16, pair(torch.bfloat16, common=12.0), backend)


@pytest.mark.parametrize("scale", (0.02, 0.7))
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_rows_whose_first_block_tells_nothing_about_their_largest_logit(divergence, scale):
    """Logits rise by more than 40 along a row, and with the larger scale their differences exceed 40. An ulp of such a
    logit is 4e-6."""
    student, weight, teacher, _ = pair(torch.float32, scale=scale)
    weight = weight * torch.linspace(0.1, 16, len(weight))[:, None]
    logits = student @ weight.T
    assert (logits.amax(1) - logits[:, :128].amax(1)).max() > 40
    assert ((teacher - student) @ weight.T).max() > 40 or scale < 0.1
    check(torch.float32, (student, weight, teacher, None), "triton", loss_bound=5e-6, divergence=divergence)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ("reverse_kl", "jsd"))
def test_both_clips(divergence, backend):
    tensors = pair(torch.float32)
    options = dict(divergence=divergence, beta=0.3, entry_clip=1e-4, token_clip=3e-3, reduction="sum")
    check(torch.float32, tensors, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_softcap_temperatures_mask_and_weights(backend):
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(301, generator=g)
    options = dict(
        student_bias=bias,
        teacher_bias=bias + 0.05 * torch.randn(301, generator=g),
        softcap=5.0,
        temperature=0.7,
        teacher_temperature=0.8,
        mask=torch.tensor([True, False, True, True, False]),
        token_weight=torch.rand(5, generator=g),
    )
    check(torch.float32, pair(torch.float32), backend, divergence="forward_kl", **options)


@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("size", (None, 40))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_teacher(dtype, size, softcap):
    tensors, mix = views(dtype, size)
    check(dtype, tensors, "triton", softcap=softcap, teacher_mix=mix)


@pytest.mark.parametrize("softcap", (None, 5.0))
def test_views_with_biases_that_exclude_entries_and_weights_for_each_token(softcap):
    tensors, mix = views(torch.float32)
    biases = torch.randn(3, 301, generator=torch.Generator().manual_seed(5))
    biases[1, 7:40] = biases[2, 290:] = -torch.inf
    mix = mix[:, None] + torch.tensor([[0.1], [-0.1]]) * torch.arange(5)
    options = dict(softcap=softcap, temperature=0.7, teacher_temperature=0.8, divergence="jsd")
    mask = torch.tensor([True, False, True, True, False])
    check(
        torch.float32, tensors, "triton", teacher_mix=mix, student_bias=biases[0], teacher_bias=list(biases[1:]),
        mask=mask, chunk_bytes=2 * 12 * 301, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_only_one_or_neither_model_knows(backend):
    bias_s, bias_t = torch.zeros(301), torch.zeros(301)
    bias_s[7:40] = bias_t[7:40] = -torch.inf
    bias_t[100:103] = -torch.inf  # the teacher gives them no mass: KL(p || q) stays finite
    check(torch.float32, pair(torch.float32), backend, student_bias=bias_s, teacher_bias=bias_t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_masked_rows_hold_has_no_influence(backend):
    student, weight, teacher, _ = pair(torch.float32)
    mask = torch.tensor([True, True, False, True, False])
    student[2], teacher[4] = torch.nan, torch.inf
    h, w = on_gpu(student).requires_grad_(), on_gpu(weight).requires_grad_()
    targets = torch.where(mask, 3, -100)
    loss, stats = linear_divergence(
        h, w, on_gpu(teacher), mask=on_gpu(mask), targets=on_gpu(targets), return_stats=True, backend=backend
    )
    loss.backward()
    for tensor in (loss, h.grad, w.grad, *stats):
        assert torch.isfinite(tensor.float()).all()
    assert h.grad[2].abs().sum() == 0 and h.grad[4].abs().sum() == 0
    expected = reference.linear_divergence(student[mask], weight, teacher[mask])
    assert relative(loss.detach(), expected) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend):
    student, weight, teacher, _ = pair(torch.float32)
    targets = torch.tensor([0, 300, 5, 128, 127])
    _, stats = linear_divergence(
        *map(on_gpu, (student, weight, teacher)), targets=on_gpu(targets), return_stats=True, backend=backend
    )
    s, t = reference.logits(student, weight), reference.logits(teacher, weight)
    for value, expected in zip(stats, reference.token_stats(s, t, targets), strict=True):
        torch.testing.assert_close(value.cpu().double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_chunks_of_rows_or_columns(backend):
    tensors = pair(torch.bfloat16)
    check(torch.bfloat16, tensors, backend, divergence="jsd", chunk_bytes=2 * 6 * 301)
    check(torch.bfloat16, tensors, backend, divergence="reverse_kl", chunk_bytes=5 * 2 * 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, dict(temperature=1.3, softcap=4.0)), ids=("plain", "softcap"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(dtype, options, backend):
    hidden, weight, _, _ = pair(dtype)
    targets = torch.tensor([0, 300, 5, 128, 127])
    mask = torch.tensor([True, True, False, True, True])
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.25])
    h, w = on_gpu(hidden).requires_grad_(), on_gpu(weight).requires_grad_()
    value, stats = linear_logprobs(
        h, w, on_gpu(targets), mask=on_gpu(mask), backend=backend, return_stats=True, **options
    )
    (value * on_gpu(upstream)).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference.linear_logprobs(h64, w64, targets, mask=mask, **options)
    (expected * upstream).sum().backward()
    assert relative(value.detach(), expected.detach()) <= LOSS_BOUND[dtype]
    assert relative(h.grad, h64.grad) <= BOUND[dtype]
    assert relative(w.grad, w64.grad) <= BOUND[dtype]
    q = reference.logits(hidden, weight, **options).softmax(-1)
    entropy = torch.where(mask, torch.special.entr(q).sum(-1), 0.0)
    assert relative(stats.student_entropy, entropy) <= 1e-4


@pytest.mark.parametrize("tail", ("bucket", "renormalise", "ignore"))
@pytest.mark.parametrize("options", ({}, dict(temperature=1.3, softcap=4.0)), ids=("plain", "softcap"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_teacher_known_by_its_top_entries(dtype, options, tail):
    """140 entries of 301, so that a row's ids take two blocks; masked rows may hold anything."""
    student, weight, teacher, _ = pair(dtype, scale=0.2)
    bias = torch.randn(301, generator=torch.Generator().manual_seed(2)).to(dtype)
    scaling = dict(softcap=options.get("softcap"), temperature=options.get("temperature", 1.0))
    logprobs, ids = reference.logits(teacher, weight, bias, **scaling).log_softmax(-1).topk(140)
    ids[1, 100:], logprobs = -1, logprobs.float()
    mask = torch.tensor([True, True, False, True, True])
    ids[2], logprobs[2] = 5, torch.nan
    results = []
    for oracle in (True, False):
        h, w = (x.double() if oracle else on_gpu(x) for x in (student, weight))
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        given = (h, w, *((ids.masked_fill(~mask[:, None], -1), logprobs) if oracle else map(on_gpu, (ids, logprobs))))
        known = {k: v if oracle else on_gpu(v) for k, v in dict(student_bias=bias, mask=mask, **options).items()}
        known |= dict(tail=tail, divergence="jsd", beta=0.3)
        if oracle:
            loss = reference.linear_topk_divergence(*given, **known)
        else:
            loss, _ = linear_topk_divergence(
                *given, backend="triton", targets=on_gpu(ids[:, 0]), return_stats=True, chunk_bytes=301 * 80, **known
            )
        (loss * 256).backward()
        results.append((loss.detach(), h.grad, w.grad))
    (true, *true_grads), (loss, *grads) = results
    assert relative(loss, true) <= max(LOSS_BOUND[dtype], 1e-5)
    assert all(relative(g, t) <= BOUND[dtype] for g, t in zip(grads, true_grads, strict=True))


SCALING = ("student_bias", "teacher_bias", "teacher_mix", "softcap", "temperature")
SHARD_OPTIONS = {
    "plain": {},
    "one sweep": dict(divergence="reverse_kl"),
    "clips, biases and softcap": dict(
        divergence="jsd", beta=0.3, entry_clip=1e-4, token_clip=3e-3, softcap=5.0, temperature=0.7,
        mask=torch.tensor([True, False, True, True, True]),
        student_bias=torch.linspace(-1, 1, 301), teacher_bias=torch.linspace(-0.98, 1, 301),
    ),
    "views": dict(divergence="jsd", beta=0.3, temperature=0.7),
}  # fmt: skip


def together(world, monkeypatch, tensors, options, function=linear_divergence):
    """Loss, statistics and gradients of `function` over a head whose rows lie on several ranks, the last with 3 rows.
    `tensors` begin with the student's hidden states and head."""
    ranks = ThreadRanks(world, monkeypatch)
    sizes = [298, 3] if world == 2 else [130, 168, 3]

    tensors, options = [on_gpu(x) for x in tensors], {k: on_gpu(v) for k, v in options.items()}

    def mine(rank):
        def share(x):
            if isinstance(x, list):
                return [share(y) for y in x]
            return x.split(sizes)[rank].clone() if x is not None and len(x) == 301 else x

        h, w = tensors[0].clone().requires_grad_(), share(tensors[1]).requires_grad_()
        rest = [share(x) for x in tensors[2:]]
        known = {k: share(v) if "bias" in k else v for k, v in options.items()}
        loss, stats = function(h, w, *rest, backend="triton", group=ranks, return_stats=True, **known)
        loss.backward()
        return loss.detach(), stats, h.grad, w.grad

    found = ranks.run(mine)
    for loss, stats, grad, _ in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][2])
        assert all(a is None or torch.equal(a, b) for a, b in zip(stats, found[0][1], strict=True))
    return *found[0][:3], torch.cat([grad for *_, grad in found])


@pytest.mark.parametrize("world", (2, 3))
@pytest.mark.parametrize("shared", (True, False), ids=("shared", "separate"))
@pytest.mark.parametrize("options", SHARD_OPTIONS)
def test_a_head_sharded_by_its_vocabulary(options, shared, world, monkeypatch):
    """Three ranks' programs are filled up to a power of two; the last rank's are mostly empty."""
    dtype = torch.bfloat16 if options == "plain" else torch.float32
    tensors, several, options = pair(dtype, shared=shared), options == "views", SHARD_OPTIONS[options]
    if several:
        tensors, mix = views(dtype, None if shared else 40)
        options = dict(options, teacher_mix=mix)
    targets = torch.tensor([0, 300, 5, 128, 299])
    loss, stats, *grads = together(world, monkeypatch, tensors, dict(options, targets=targets))
    h, w, t, w_t = map(in_float64, tensors)
    true = reference.linear_divergence(h.requires_grad_(), w.requires_grad_(), t, w_t, **options)
    true.backward()
    assert relative(loss, true.detach()) <= LOSS_BOUND[dtype]
    one_gpu = linear_divergence(*map(on_gpu, tensors), backend="triton", **{k: on_gpu(v) for k, v in options.items()})
    assert relative(loss, one_gpu.cpu().double()) <= LOSS_BOUND[dtype]
    assert all(relative(g, x.grad) <= BOUND[dtype] for g, x in zip(grads, (h, w), strict=True))
    scaling = {k: v for k, v in options.items() if k in SCALING}
    s, t = reference.logit_pair(h.detach(), w.detach(), t, w_t, **scaling)
    known = {k: v for k, v in options.items() if k in ("divergence", "beta")}
    for value, expected in zip(stats, reference.token_stats(s, t, targets, **known), strict=True):
        expected = expected if "mask" not in options else torch.where(options["mask"], expected, 0)
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(value.cpu().double(), expected.double(), rtol=bound, atol=bound / 10)


@pytest.mark.parametrize("world", (2, 3))
def test_log_probabilities_of_a_sharded_head(world, monkeypatch):
    hidden, weight, _, _ = pair(torch.float32)
    targets, mask = torch.tensor([0, 300, 5, 128, 299]), torch.tensor([True, True, False, True, True])

    def mean(*tensors, return_stats, **options):
        value, stats = linear_logprobs(*tensors, return_stats=True, **options)
        return value.sum(), stats

    _, stats, *grads = together(world, monkeypatch, (hidden, weight, targets), dict(mask=mask), mean)
    h, w = (in_float64(x).requires_grad_() for x in (hidden, weight))
    true = reference.linear_logprobs(h, w, targets, mask=mask)
    true.sum().backward()
    assert relative(stats.student_logprob, true.detach()) <= 1e-6
    assert all(relative(g, x.grad) <= 1e-5 for g, x in zip(grads, (h, w), strict=True))


@pytest.mark.parametrize("world", (2, 3))
def test_a_teacher_known_by_its_top_entries_against_a_sharded_head(world, monkeypatch):
    hidden, weight, teacher, _ = pair(torch.float32, scale=0.2)
    logprobs, ids = (teacher @ weight.T).log_softmax(-1).topk(140)
    loss, _, *grads = together(
        world, monkeypatch, (hidden, weight, ids, logprobs), dict(targets=ids[:, 0]), linear_topk_divergence
    )
    h, w = (in_float64(x).requires_grad_() for x in (hidden, weight))
    true = reference.linear_topk_divergence(h, w, ids, logprobs)
    true.backward()
    assert relative(loss, true.detach()) <= 1e-5
    assert all(relative(g, x.grad) <= 1e-5 for g, x in zip(grads, (h, w), strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_exposure_spans(dtype):
    hidden, weight, _, _ = pair(dtype, n=21)
    hidden = hidden.reshape(3, 7, -1)
    targets = torch.arange(21).reshape(3, 7) * 13
    lengths, exposed = torch.tensor([7, 4, 3]), torch.tensor([2, 0, 3])
    outside = (torch.arange(7) < exposed[:, None]) | (torch.arange(7) >= lengths[:, None])
    noisy = hidden.masked_fill(outside[..., None], torch.nan)
    arguments = (noisy, weight, targets.masked_fill(outside, -100), lengths, exposed)
    value = exposure_logprobs(*map(on_gpu, arguments), backend="triton")
    logprobs = reference.linear_logprobs(hidden, weight, targets).masked_fill(outside, 0.0)
    assert relative(value, logprobs.sum(1) / (~outside).sum(1).clamp_min(1)) <= LOSS_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_logits_with_rows_far_apart_in_memory(dtype):
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 5, 640, generator=g).to(dtype)
    s, t = wide[0, :, :301], wide[0, :, :301] + (0.1 * wide[1, :, :301]).to(dtype)
    leaf = on_gpu(s).requires_grad_()
    divergence(leaf, on_gpu(t), divergence="jsd", backend="triton").backward()
    s64 = s.double().requires_grad_()
    reference.token_divergence(s64, t.double(), divergence="jsd").mean().backward()
    assert relative(leaf.grad, s64.grad) <= BOUND[dtype]


@pytest.mark.skipif(SANITIZED, reason="its tensors lie on the CPU, where torch multiplies")
@pytest.mark.parametrize("keep_graph", (False, True))
def test_an_upstream_number_is_not_rounded_to_bf16(keep_graph):
    student, weight, teacher, _ = pair(torch.bfloat16, n=64)
    factor = 1.001 / 3  # bf16 would make it 0.1 % larger
    grads = []
    for upstream in (1.0, factor):
        h, w = on_gpu(student).requires_grad_(), on_gpu(weight).requires_grad_()
        loss = linear_divergence(h, w, on_gpu(teacher), backend="triton")
        loss.backward(torch.tensor(upstream, device=DEVICE), retain_graph=keep_graph)
        grads.append([g.double() for g in (h.grad, w.grad)])
    for one, scaled in zip(*grads, strict=True):
        assert ((one * scaled).sum() / (one * one).sum()).item() == pytest.approx(factor, rel=2e-4)


def test_two_runs_give_the_same_bits():
    student, weight, teacher, _ = pair(torch.bfloat16)
    for backend in BACKENDS:
        grads = []
        for _ in range(2):
            h, w = on_gpu(student).requires_grad_(), on_gpu(weight).requires_grad_()
            linear_divergence(h, w, on_gpu(teacher), divergence="jsd", backend=backend).backward()
            grads.append((h.grad, w.grad))
        for first, second in zip(*grads, strict=True):
            assert torch.equal(first, second)


@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_can_be_captured_in_a_cuda_graph(backend):
    student, weight, teacher, _ = map(on_gpu, pair(torch.bfloat16))
    mask = torch.tensor([True, True, False, True, True], device=DEVICE)
    h = student.requires_grad_()

    def step():
        h.grad = None
        loss = linear_divergence(h, weight, teacher, mask=mask, backend=backend)
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        h += 0.05
    captured = h.grad
    graph.replay()
    replayed = loss.clone(), captured.clone()
    assert torch.equal(replayed[0], step()) and torch.equal(replayed[1], h.grad)
