"""What is particular to the Triton backends, under Triton's interpreter: set TRITON_INTERPRET=1, or have a GPU.

The tests every backend must pass are in the other files of this folder; those that need bf16, a compiler's view of
memory and several programs are in `test_triton_gpu.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest
import torch

from atesd_kernels import linear_divergence, linear_logprobs, planning, tuning
from atesd_kernels.divergences import _REGISTRY, get_divergence

from .cases import DEVICE, DIVERGENCES, compare, make_pair

BACKENDS = ("triton", "triton_tiled")
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
    result = compare(make_pair(n=3, v=4100), divergence=divergence, beta=0.3, backend=backend)
    assert result.loss_error <= 1e-6
    assert result.hidden_error <= 1e-5
    assert result.weight_error <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_triton_twins_agree_with_their_definition_near_and_far(divergence, backend):
    for scale in (1e-3, 0.3, 3.0):
        pair = make_pair(n=2, v=521, scale=scale)
        clipped = compare(pair, divergence=divergence, beta=0.3, entry_clip=1e-4, reduction="sum", backend=backend)
        plain = compare(pair, divergence=divergence, beta=0.3, backend=backend)
        for result in (clipped, plain):
            assert result.hidden_error <= 1e-5
        assert plain.loss_error <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_inputs(backend):
    result = compare(make_pair(n=5, v=521, scale=0.01, dtype=torch.float16), backend=backend)
    assert result.hidden_error <= 2e-3


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


def test_the_kernels_stay_within_700_lines_of_code():
    """Docstrings, comments and blank lines not counted."""
    import triton

    from atesd_kernels.kernels import logprobs, rows, terms, tiles

    lines = set()
    for module in (terms, rows, logprobs, tiles):
        source = inspect.getsource(module)
        for function in ast.parse(source).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            assert isinstance(getattr(module, function.name), triton.runtime.jit.KernelInterface)
            code = function.body[1:] if ast.get_docstring(function) else function.body
            numbers = [
                *range(function.lineno, function.body[0].lineno),
                *range(code[0].lineno, function.end_lineno + 1),
            ]
            text = source.splitlines()
            lines |= {
                (module, i) for i in numbers if (t := text[i - 1].strip()) and t[0] != "#" and not t.startswith('"""')
            }
    assert 300 < len(lines) < 700, len(lines)
