"""What is particular to the Triton backends, on a GPU or under Triton's interpreter.

The tests every backend must pass are in the other files of this folder; those that need bf16, a compiler's view of
memory and several programs are in `test_triton_gpu.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atesd_kernels import divergence as logit_divergence
from atesd_kernels import exposure_logprobs, linear_divergence, linear_logprobs, ops, planning, reference
from atesd_kernels.backends import triton_chunked, tuning
from atesd_kernels.divergences import _REGISTRY, get_divergence
from atesd_kernels.topk import linear_topk_divergence

from .cases import DEVICE, DIVERGENCES, compare, make_pair, relative_l2

BACKENDS = ("triton",)
pytestmark = pytest.mark.skipif(
    any(planning.unavailable(b, DEVICE) for b in BACKENDS), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(params=(1, 12), ids=("one-program-per-row", "several"))
def splits(request, monkeypatch):
    monkeypatch.setattr(tuning, "num_processors", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd"))
def test_rows_split_over_programs_give_the_same_loss_and_gradient(divergence, backend, splits):
    result = compare(make_pair(n=3, v=2100), divergence=divergence, beta=0.3, backend=backend)
    assert result.loss_error <= 1e-6
    assert result.hidden_error <= 1e-5
    assert result.weight_error <= 1e-5


def test_programs_of_a_row_whose_differences_lie_apart_merge_to_rounding(splits):
    """In the second block the student's mass lies at d = -9 and the teacher's at d = 19. The block's sum of
    q expm1(d + 9) is thus 1e12 times q, of which e^-9 counts in the row, whose mean d is near 0."""
    s, noise = torch.randn(2, 3, 2048, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    d = 0.1 * noise
    s[:, 1024:] = -10.0
    s[:, 1024], d[:, 1024] = 3.0, -9.0
    s[:, 1025], d[:, 1025] = -8.0, 19.0
    leaf, wide = s.clone().requires_grad_(), s.double().requires_grad_()
    logit_divergence(leaf, s + d, reduction="none", backend="triton").sum().backward()
    reference.token_divergence(wide, (s + d).double()).sum().backward()
    assert relative_l2(leaf.grad, wide.grad) <= 3e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("h, described", ((72, True), (31, False)))
def test_a_head_read_through_a_tensor_descriptor_gives_the_same_numbers(h, described, dtype, monkeypatch):
    """Beyond the last of 301 tokens and the last of 72 hidden units the descriptor gives zeros; rows of 31 numbers do
    not begin at multiples of 16 bytes, and go the other way."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made, from_tensor = [], TensorDescriptor.from_tensor
    monkeypatch.setattr(TensorDescriptor, "from_tensor", lambda *args: made.append(args) or from_tensor(*args))
    results = []
    for tma in (False, True):
        tile = tuning.TileConfig(16, 32, 64, 4, 1, tma=tma)
        monkeypatch.setattr(tuning, "tile_config", lambda device, dtype, tile=tile: tile)
        pair = make_pair(n=19, h=h, v=301, dtype=dtype)
        hidden, targets = pair.student_hidden[None], torch.arange(19, device=DEVICE)[None]
        lengths, exposed = (torch.tensor([n], device=DEVICE) for n in (17, 2))
        results.append(exposure_logprobs(hidden, pair.student_weight, targets, lengths, exposed, backend="triton"))
        assert bool(made) == (tma and described)
    # not the same bits: the interpreter multiplies by NumPy, whose order of summation follows strides and processor
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jeffreys"))
def test_a_term_of_ones_own_with_a_known_derivative_sum_takes_one_sweep_as_the_built_in_does(divergence, monkeypatch):
    from atesd_kernels.kernels import rows

    phases, launch = [], rows.accumulate.run

    def run(*arguments, **options):
        phases.append(options["PHASE"])
        return launch(*arguments, **options)

    monkeypatch.setattr(rows.accumulate, "run", run)
    own = replace(get_divergence(divergence, 0.5), name=f"my {divergence}")
    unknown = replace(own, derivative_sum=None)
    results = {}
    for name, term in (("built in", divergence), ("own", own), ("unknown", unknown)):
        pair = make_pair(n=3, h=24, v=261)
        hidden = pair.student_hidden.clone().requires_grad_()
        loss = linear_divergence(hidden, *pair.tensors[1:], divergence=term, backend="triton")
        loss.backward()
        results[name], phases[:] = (loss.detach(), hidden.grad, list(phases)), []
    assert results["own"][2] == results["built in"][2] == ["both"] and results["unknown"][2] == ["sum", "grad"]
    assert all(torch.equal(results["own"][i], results["built in"][i]) for i in range(2))
    assert torch.allclose(results["own"][1], results["unknown"][1], rtol=1e-4, atol=1e-9)


class NoHostSync(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a value read back, or a shape that depends on values. A CUDA graph
    cannot be captured around either."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func.overloadpacket.__name__ in self.SYNCS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync(monkeypatch):
    """Watches the backends, under the operators that hide what they do from dispatch modes."""
    backend = ops._backend

    def watched(name, function):
        def run(*args):
            with NoHostSync():
                return backend(name, function)(*args)

        return run

    monkeypatch.setattr(ops, "_backend", watched)


@pytest.mark.parametrize(
    "ask", (lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x if x.any() else 0)
)
def test_the_watch_for_host_syncs_sees_them(ask):
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        ask(torch.ones(3, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("options", ({}, dict(entry_clip=1e-4, token_clip=0.1, softcap=20.0, divergence="jsd")))
def test_no_call_waits_for_the_device(options, reduction, backend, no_host_sync):
    pair = make_pair(n=4, h=24, v=300)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    targets = torch.tensor([0, 5, 299, 7], device=DEVICE)
    h, w = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
    with NoHostSync():
        loss, stats = linear_divergence(
            h, w, pair.teacher_hidden, mask=mask, targets=targets, token_weight=mask.float(), return_stats=True,
            reduction=reduction, backend=backend, chunk_bytes=8 * 300 * 2, **options,
        )  # fmt: skip
        loss.sum().backward()
        linear_logprobs(h, w, targets, mask=mask, backend=backend).sum().backward()
    assert h.grad.abs().sum() > 0 and stats.student_entropy.sum() > 0


@pytest.mark.parametrize("views", ((None, None), (30, None)))
@pytest.mark.parametrize("softcap", (None, 20.0))
def test_views_of_a_teacher_do_not_wait_for_the_device_either(softcap, views, no_host_sync):
    pair = make_pair(n=4, h=24, v=300, views=views)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    bias = [torch.zeros(300, device=DEVICE), None]
    h = pair.student_hidden.clone().requires_grad_()
    # the weights' sums are checked where that costs nothing, as spans are
    linear_divergence(
        h, *pair.tensors[1:], teacher_mix=pair.teacher_mix, teacher_bias=bias, mask=mask, softcap=softcap,
        backend="triton", chunk_bytes=12 * 300 * 2,
    ).backward()  # fmt: skip
    assert h.grad.abs().sum() > 0


@pytest.mark.parametrize("views, options, expected", (
    ((None, None), {}, 4 + 4), ((None, None), dict(softcap=8.0), 4 + 4 + 4), ((30, None), {}, 8 + 4 + 8),
))  # fmt: skip
def test_a_chunk_s_budget_includes_the_product_of_a_view(views, options, expected, monkeypatch):
    planned, chunks = [], triton_chunked.row_chunks
    monkeypatch.setattr(triton_chunked, "row_chunks", lambda *a: planned.append(a[2]) or chunks(*a))
    pair = make_pair(n=3, h=24, v=100, views=views)
    linear_divergence(*pair.tensors, teacher_mix=pair.teacher_mix, backend="triton", **options)
    assert planned == [expected]


def test_exposure_scores_do_not_wait_for_the_device_either(no_host_sync):
    pair = make_pair(n=6, h=24, v=300)
    lengths, exposed = torch.tensor([3, 2], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    targets = torch.arange(6, device=DEVICE).view(2, 3)
    # spans are checked where that costs nothing: on a CPU, before the backend
    scores = exposure_logprobs(
        pair.student_hidden.view(2, 3, -1), pair.student_weight, targets, lengths, exposed, backend="triton"
    )
    assert scores[0] < 0 and scores[1] == 0


@pytest.fixture
def vocabulary_traffic(monkeypatch):
    """Bytes that interpreted kernels load and store in blocks of a row."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counted = []

    def count(name):
        method = getattr(interpreter.InterpreterBuilder, name)
        mask_at = 1 if name == "create_masked_load" else 2

        def run(self, ptrs, *args):
            mask = args[mask_at - 1].data
            if mask.size >= 128:
                counted.append(int(mask.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8)
            return method(self, ptrs, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, run)

    count("create_masked_load"), count("create_masked_store")
    return counted


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what the interpreter does")
@pytest.mark.parametrize("logits_dtype, options, limit", (
    (torch.float32, {}, 14), (torch.float32, dict(divergence="jsd"), 20), (torch.float32, dict(entry_clip=1e-3), 20),
    (torch.float16, {}, 10), (torch.float16, dict(divergence="jsd"), 14),
))  # fmt: skip
def test_row_kernels_read_and_write_each_logit_pair_as_few_times_as_promised(
    logits_dtype, options, limit, vocabulary_traffic, monkeypatch
):
    monkeypatch.setattr(tuning, "row_config", lambda device, vocab: tuning.RowConfig(256, 4))
    n, v = 4, 1300
    pair = make_pair(n=n, h=16, v=v, dtype=torch.float16)
    weight = pair.student_weight.clone().requires_grad_()
    linear_divergence(
        pair.student_hidden, weight, pair.teacher_hidden, backend="triton", logits_dtype=logits_dtype, **options
    ).backward()
    first_block = 6 * 256 / v  # read once more for the reference difference, from the cache
    assert limit <= sum(vocabulary_traffic) / (n * v) <= limit + first_block


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a mapped file needs no memory on a CPU only")
def test_rows_may_lie_more_than_two_to_the_31_entries_apart(tmp_path):
    apart = (1 << 30) + 512
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * apart + 600, dtype=torch.float16)
    s = file.as_strided((3, 261), (apart, 1))
    s.copy_(torch.randn(3, 261, generator=torch.Generator().manual_seed(0)))
    t = s.clone() + 0.125
    t[:, ::2] += 0.5
    values = [logit_divergence(x, t, reduction="none", backend="triton") for x in (s, s.clone())]
    assert torch.equal(*values) and (values[0] > 0).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a mapped file needs no memory on a CPU only")
def test_rows_of_a_head_may_lie_as_far_apart(tmp_path):
    v, apart = 70, 1 << 25
    file = torch.from_file(str(tmp_path / "head"), shared=True, size=v * apart, dtype=torch.float16)
    head = file.as_strided((v, 24), (apart, 1))
    pair = make_pair(n=3, h=24, v=v, dtype=torch.float16)
    head.copy_(pair.student_weight)
    targets = torch.tensor([0, 68, 69])
    span = (torch.tensor([3]), torch.tensor([0]))
    values = [
        exposure_logprobs(pair.student_hidden[None], w, targets[None], *span, backend="triton")
        for w in (head, pair.student_weight)
    ]
    assert torch.equal(*values)


def test_every_divergence_of_the_library_has_a_triton_function():
    for name in DIVERGENCES:
        module, function = get_divergence(name, 0.5).triton.split(":")
        assert hasattr(importlib.import_module(module), function), name
    assert set(DIVERGENCES) <= set(_REGISTRY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_hidden_states_need_no_copy(backend):
    pair = make_pair(n=4, h=24, v=300)
    wide = torch.randn(4, 48, device=DEVICE)
    wide[:, :24] = pair.student_hidden
    strided = linear_divergence(wide[:, :24], pair.student_weight, pair.teacher_hidden, backend=backend)
    assert torch.equal(strided, linear_divergence(*pair.tensors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_counted_rows(backend):
    pair = make_pair(n=3, v=200)
    h = pair.student_hidden.clone().requires_grad_()
    mask = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    loss = linear_divergence(h, pair.student_weight, pair.teacher_hidden, mask=mask, backend=backend)
    loss.backward()
    assert loss == 0 and not h.grad.any()
    empty = linear_divergence(h[:0], pair.student_weight, pair.teacher_hidden[:0], backend=backend)
    assert empty == 0
    assert linear_logprobs(h[:0], pair.student_weight, mask[:0].long(), backend=backend).shape == (0,)


def test_the_kernels_stay_under_1000_lines():
    """Every line from a kernel's decorator to its end, comments and docstring included."""
    import triton

    from atesd_kernels.kernels import bounded, elementwise, logprobs, mixing, rows, terms, tiles

    lines = 0
    for module in (terms, bounded, elementwise, mixing, rows, logprobs, tiles):
        for function in ast.parse(inspect.getsource(module)).body:
            if isinstance(function, ast.FunctionDef):
                assert isinstance(getattr(module, function.name), triton.runtime.jit.KernelInterface)
                lines += function.end_lineno - function.decorator_list[0].lineno + 1
    assert 300 < lines < 1000, lines


@pytest.mark.parametrize("tail", ("bucket", "renormalise", "ignore"))
@pytest.mark.parametrize("options", ({}, dict(entry_clip=1e-4, token_clip=0.1, softcap=20.0, divergence="jsd")))
def test_a_teacher_s_top_k_waits_for_the_device_as_little(options, tail, no_host_sync):
    """Its ids and their mass are checked where that costs nothing: on a CPU, before the backend."""
    pair = make_pair(n=4, h=24, v=300)
    logprobs, ids = (pair.teacher_hidden @ pair.student_weight.T).log_softmax(-1).topk(9)
    ids[0, 3:] = -1
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    h, w = pair.student_hidden.clone().requires_grad_(), pair.student_weight.clone().requires_grad_()
    loss, stats = linear_topk_divergence(
        h, w, ids, logprobs, mask=mask, targets=ids[:, 0], token_weight=mask.float(), return_stats=True, tail=tail,
        backend="triton", chunk_bytes=12 * 500 * 2, **options,
    )  # fmt: skip
    with NoHostSync():
        loss.backward()
    assert h.grad.abs().sum() > 0 and stats.student_entropy.sum() > 0
