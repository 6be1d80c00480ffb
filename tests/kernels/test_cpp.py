"""Backend "cpp": its functions, its rows and its products beside float64, and who gets it when."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from atesd_kernels import linear_divergence, linear_logprobs, planning
from atesd_kernels.backends import matmul
from atesd_kernels.cpp import library
from atesd_kernels.divergences import get_divergence

from .cases import make_pair, relative_l2

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")


def vectors(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_it_can_be_built_here():
    assert library.unavailable() is None


APPLY = """
#include "functions.h"
extern "C" void apply(const float* x, float* y, long n, int which) {
  using namespace atesd;
  for (long j = 0; j < n; ++j) {
    const float of[] = {exp(x[j]), expm1(x[j]), log(x[j]), log1p(x[j])};
    y[j] = of[which];
  }
}
"""


def test_its_functions_keep_the_digits_of_a_float(tmp_path):
    source = tmp_path / "apply.cpp"
    source.write_text(APPLY)
    command = [
        *library.compiler(),
        *library.FLAGS,
        f"-I{library.SOURCES}",
        str(source),
        "-o",
        str(tmp_path / "apply.so"),
    ]
    subprocess.run(command, check=True)
    apply = ctypes.CDLL(str(tmp_path / "apply.so")).apply
    tiny = torch.logspace(-30, 0, 20_001)
    signed = torch.cat([torch.linspace(-87, 88, 200_001), tiny, -tiny])
    positive = torch.cat([torch.logspace(-37, 30, 200_001), 1 + tiny, 1 - tiny[tiny < 0.999]])
    above = torch.cat([torch.logspace(-30, 30, 200_001), -tiny[tiny < 0.999]])
    functions = [(torch.exp, signed), (torch.expm1, signed), (torch.log, positive), (torch.log1p, above)]
    for which, (function, x) in enumerate(functions):
        x, y = x.contiguous(), torch.empty_like(x)
        apply(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(x)), which)
        exact = function(x.double())
        error = ((y.double() - exact) / exact)[exact != 0].abs().max()
        assert error < 3e-7, (function, error)

    def results(which, *numbers):
        x, y = torch.tensor(numbers), torch.ones(len(numbers))
        apply(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(numbers)), which)
        return y

    assert (results(0, -87.5, -1e3, -1e7, -1e30, -float("inf")) == 0).all()
    assert (results(1, -87.5, -1e3, -1e5) == -1).all()
    assert results(0, float("nan")).isnan().all() and results(1, float("nan")).isnan().all()


@pytest.mark.parametrize("vocab", [1, 7, 1024, 1025, 5003])  # below, at and beyond a block of the sums
@pytest.mark.parametrize("name", library.TERMS)
def test_rows_of_any_width_agree_with_float64(name, vocab):
    s, d = vectors(5, vocab) * 3, vectors(5, vocab, 1) * 0.1
    log_q, log_p = (z.double().div(1.1).log_softmax(1) for z in (s, s.double() + d))
    l, u = get_divergence(name, 0.3).term(log_p, log_q, 0.3)
    gradient = u - log_q.exp() * u.sum(1, keepdim=True)
    out = torch.empty_like(s)
    found, tokens = library.divergence(name, 0.3, s.clone(), d.clone(), out, 1 / 1.1, 1 / 1.1, None, None, True)
    if vocab > 1:
        assert relative_l2(found["value"], l.sum(1)) < 2e-6
        assert relative_l2(out.double() * found["scale"][:, None].double(), gradient) < 2e-6
    torch.testing.assert_close(
        found["entropy_s"].double(), torch.special.entr(log_q.exp()).sum(1), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        found["entropy_t"].double(), torch.special.entr(log_p.exp()).sum(1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(tokens, torch.stack([log_q.argmax(1), log_p.argmax(1)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "difference"])
@pytest.mark.parametrize("column", [0, 1, 15, 16, 40, 1023, 1024, 1098, 1099])
def test_a_row_with_a_number_that_is_not_finite_is_never_near(bad, where, column):
    for name in ("forward_kl", "jsd"):
        s, d = vectors(3, 1100), vectors(3, 1100, 1)
        (s if where == "student" else d)[1, column] = bad
        found, _ = library.divergence(name, 0.5, s, d, None, 1.0, 1.0, None, None, False)
        near = found["extreme"] <= 40
        assert near.tolist() == [True, False, True]


@pytest.mark.parametrize("column", [0, 1, 40, 1023, 1099])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_log_probs_beside_a_logit_that_is_not_finite_are_nan(bad, column):
    z = vectors(3, 1100)
    z[1, column] = bad
    assert library.logprobs(z, None, 1.0, None)[1].isnan().tolist() == [False, True, False]
    z = vectors(2, 1100)
    z[1, column] = -float("inf")  # an entry excluded from the vocabulary
    expected = z.double().logsumexp(1)
    torch.testing.assert_close(library.logprobs(z, None, 1.0, None)[1].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_head_with_nan_gives_nan_as_backend_torch_does():
    pair = make_pair(n=5, v=1009)
    pair.student_weight[700] = float("nan")
    for backend in ("torch", "cpp"):
        loss = linear_divergence(pair.student_hidden, pair.student_weight, pair.teacher_hidden, backend=backend)
        values = linear_logprobs(pair.student_hidden, pair.student_weight, torch.zeros(5).long(), backend=backend)
        assert loss.isnan() and values.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    pair = make_pair(n=40, v=1009)

    def losses():
        arguments = pair.student_hidden, pair.student_weight, pair.teacher_hidden
        loss, stats = linear_divergence(*arguments, backend="cpp", return_stats=True)
        return [loss, *stats, linear_logprobs(*arguments[:2], torch.zeros(40).long(), backend="cpp")]

    before, default = losses(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        after = losses()
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("avx512_bf16" not in library._processor().split(), reason="needs bf16 instructions")
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="kept from bf16 instructions")
def test_a_processor_with_bf16_instructions_multiplies_with_them():
    assert matmul.multiplies_bf16(64) and not matmul.multiplies_bf16(63)


@pytest.mark.skipif(not matmul.multiplies_bf16(64), reason="needs bf16 instructions")
@pytest.mark.parametrize("shape", [(1, 64, 64), (67, 1009, 48), (130, 5, 2)])
def test_products_of_bf16_matrices_are_rounded_to_fp32_only(shape):
    rows, vocab, k = shape
    h, w = vectors(rows, k).bfloat16(), vectors(vocab, k, 1).bfloat16()
    out = torch.zeros(rows, vocab + 3)
    library.product(h, w, out[:, :vocab])
    assert relative_l2(out[:, :vocab], h.double() @ w.double().T) < 1e-6
    assert (out[:, vocab:] == 0).all()


@pytest.mark.skipif(not matmul.multiplies_bf16(64), reason="needs bf16 instructions")
@pytest.mark.parametrize("shape", [(1, 64, 64), (67, 1009, 48), (130, 2050, 70), (129, 4099, 3), (5, 1, 16), (0, 8, 8)])
def test_products_with_bf16_gradients_add_to_fp32_sums(shape):
    rows, common, k = shape
    apart = torch.full((rows, common + 5), torch.nan).bfloat16()  # what lies beside the factor is no part of it
    g, w = apart[:, :common], vectors(common, k, 1).bfloat16()
    g.copy_(vectors(rows, common))
    acc, packed = vectors(rows + 2, k, 2), torch.full((library.packed_rows(common) + 2, k), torch.nan).bfloat16()
    before = acc.clone()
    library.add_product(g, w, acc[:rows], packed[:-2])
    assert rows == 0 or relative_l2(acc[:rows], before[:rows].double() + g.double() @ w.double()) < 1e-6
    assert torch.equal(acc[rows:], before[rows:]) and packed[-2:].isnan().all()


def test_bf16_gradients_of_hidden_states_come_from_it(monkeypatch):
    used, add = [], library.add_product
    monkeypatch.setattr(library, "add_product", lambda *a: used.append(a[2].dtype) or add(*a))
    pair = make_pair(n=40, v=1009, dtype=torch.bfloat16)
    hidden = pair.student_hidden.requires_grad_()
    linear_divergence(hidden, pair.student_weight, pair.teacher_hidden, backend="cpp").backward()
    assert set(used) == ({torch.float32} if matmul.multiplies_bf16(2) else set())


@pytest.mark.parametrize("options", [{}, {"clip": 1e-5}, {"stats": True}, {"factor": True}])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("vocab", [1, 1023, 1025, 5003])
def test_a_float_s_place_holds_its_bf16_gradient(name, vocab, options):
    s, d = vectors(5, vocab), vectors(5, vocab, 1) * 0.1
    factor = vectors(1, 5)[0] if "factor" in options else None
    apart, found = torch.empty(5, 2 * vocab).bfloat16()[:, :vocab], []
    for place in (d.clone(), d.clone()):
        out = place.view(torch.bfloat16)[:, :vocab] if found else apart
        arguments = 1.0, 1.0, options.get("clip"), factor, "stats" in options
        library.divergence(name, 0.5, s.clone(), place, out, *arguments)
        found.append(out.clone())
    assert torch.equal(*found) and (found[0].any() or vocab == 1)
    found = []
    for z in (s.clone(), s.clone()):
        out = z.view(torch.bfloat16)[:, :vocab] if found else apart
        library.logprobs(z, out, 1.0, factor)
        found.append(out.clone())
    assert torch.equal(*found) and found[0].any()


def with_threads(function) -> list[torch.Tensor]:
    """Results with one thread, and often with more."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, *[2, 4, 8] * 5):
            torch.set_num_threads(count)
            found.append(function())
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    pair = make_pair(n=40, v=1009, dtype=dtype)

    def gradient():
        hidden = pair.student_hidden.clone().requires_grad_()
        linear_divergence(hidden, pair.student_weight, pair.teacher_hidden, backend="cpp").backward()
        return hidden.grad

    first, *others = with_threads(gradient)
    assert all(torch.equal(first, other) for other in others) and first.any(1).all()


@pytest.mark.skipif(not matmul.multiplies_bf16(64), reason="needs bf16 instructions")
def test_threads_wait_for_the_rows_that_others_pack():
    common = 20 * library.GROUP
    g, w = vectors(8, common).bfloat16(), vectors(common, 64, 1).bfloat16()
    packed = torch.empty(library.packed_rows(common), 64, dtype=torch.bfloat16)

    def total():
        acc = torch.zeros(8, 64)
        library.add_product(g, w, acc, packed)
        return acc

    first, *others = with_threads(total)
    assert all(torch.equal(first, other) for other in others) and first.all()


def test_large_calls_on_a_cpu_take_it(monkeypatch):
    large = planning.CPP_PAIRS
    for dtype in (torch.float32, torch.bfloat16):
        assert planning.choose_backend("auto", CPU, dtype, True, large) == "cpp"
        assert planning.choose_backend("auto", CPU, dtype, True, large - 1) == "torch"
    assert planning.choose_backend("auto", CPU, torch.float64, True, large) == "torch"
    used = []
    monkeypatch.setattr(planning, "CPP_PAIRS", 40 * 1009)
    monkeypatch.setattr(library, "divergence", lambda *a, call=library.divergence: used.append(1) or call(*a))
    monkeypatch.setattr(library, "logprobs", lambda *a, call=library.logprobs: used.append(2) or call(*a))
    for n in (39, 40):
        pair = make_pair(n=n, v=1009)
        linear_divergence(pair.student_hidden, pair.student_weight, pair.teacher_hidden)
        linear_logprobs(pair.student_hidden, pair.student_weight, torch.zeros(n, dtype=torch.long))
    assert used == [1, 2]


def test_without_a_compiler_auto_does_without_and_the_name_says_why(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: "there is no C++ compiler")
    assert planning.choose_backend("auto", CPU, torch.float32, True, planning.CPP_PAIRS) == "torch"
    with pytest.raises(ValueError, match="'cpp' is not available: there is no C\\+\\+ compiler"):
        planning.choose_backend("cpp", CPU, torch.float32, True)
    with pytest.raises(ValueError, match="runs on a CPU, got cuda"):
        planning.choose_backend("cpp", torch.device("cuda"), torch.float32, True)


def test_a_library_is_built_once_and_again_when_its_flags_change(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cache", lambda: tmp_path)
    first = library.built("rows.cpp", ())
    assert first.is_relative_to(tmp_path)
    made = os.stat(first).st_mtime_ns
    assert library.built("rows.cpp", ()) == first and os.stat(first).st_mtime_ns == made
    monkeypatch.setattr(library, "FLAGS", [flag.replace("-O3", "-O1") for flag in library.FLAGS])
    assert library.built("rows.cpp", ()) != first
    assert len(list(first.parent.iterdir())) == 2  # nothing else is left


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cache", lambda: tmp_path)
    monkeypatch.setattr(library, "FLAGS", ["-no-such-flag"])
    library.rows_library.cache_clear()
    try:
        assert "no-such-flag" in library.unavailable.__wrapped__()
    finally:
        library.rows_library.cache_clear()


def test_a_processor_without_a_kernel_for_the_product_does_without():
    code = (
        "import torch; from atesd_kernels import linear_divergence as d; x = torch.randn(70, 8).bfloat16();"
        "w = torch.randn(100, 8).bfloat16(); y = x + 0.1; print(d(x, w, y, backend='cpp').isfinite().item())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "True"), found.stderr


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="this is the processor itself")
def test_without_avx512_it_is_as_exact():
    """The tests of this file that compare with float64, on a processor that is kept from AVX-512."""
    code = (
        "import pytest, torch; from atesd_kernels.cpp import library;"
        "assert torch.backends.cpu.get_cpu_capability() == 'AVX2' and '-mno-avx512f' in library.FLAGS;"
        f"raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'float or finite or nan']))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout + found.stderr


def test_a_compiler_may_come_with_arguments(monkeypatch):
    (own,) = library.compiler()
    monkeypatch.setenv("CXX", f"{own} -g0")
    assert library.compiler() == [own, "-g0"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler no-such-compiler" in library.unavailable.__wrapped__()
