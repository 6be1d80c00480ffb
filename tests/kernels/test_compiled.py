"""Backend "torch_compiled": the torch backend's passes through Inductor. Apart, because a compiler takes its time."""

import pytest
import torch

from atesd_kernels import linear_divergence, linear_logprobs, planning

from .cases import DEVICE, compare, make_pair
from .topk_cases import compare as compare_topk
from .topk_cases import known

compiler = pytest.mark.skipif(
    planning.unavailable(planning.COMPILED, DEVICE) is not None, reason="no compiler for torch.compile"
)


@compiler
def test_compiled_passes_are_as_exact_as_eager_ones_whatever_the_sizes():
    # one block, then several blocks with a narrow last one, and other numbers of rows: compiled once
    for n, v in ((67, 1009), (31, 9000), (12, 9000)):
        result = compare(make_pair(n, v=v, scale=0.07), temperature=1.1, backend="torch_compiled")
        assert max(result.hidden_error, result.weight_error) <= 1e-5 and result.loss_error <= 1e-6
    bf16 = make_pair(31, v=9000, scale=0.07, dtype=torch.bfloat16)
    assert compare(bf16, trained_head=False, backend="torch_compiled").hidden_error <= 5e-3


@compiler
def test_views_of_a_teacher_go_through_the_same_passes():
    for views, options in (((None, None), {}), ((60, None), dict(softcap=8.0, divergence="jsd"))):
        result = compare(make_pair(31, v=5000, scale=0.07, views=views), backend="torch_compiled", **options)
        assert max(result.hidden_error, result.weight_error) <= 1e-5 and result.loss_error <= 1e-6


@compiler
def test_the_other_passes_compile_too():
    options = dict(divergence="jsd", beta=0.3, entry_clip=0.01, backend="torch_compiled")
    for scale in (0.07, 8.0):  # near, and beyond the near form
        result = compare(make_pair(31, v=5000, scale=scale), **options)
        assert max(result.hidden_error, result.weight_error) <= 1e-5
    pair = make_pair(31)
    targets = torch.arange(31, device=DEVICE)
    arguments = (pair.student_hidden, pair.student_weight, targets)
    assert torch.allclose(linear_logprobs(*arguments, backend="torch_compiled"), linear_logprobs(*arguments), rtol=1e-5)


@compiler
def test_the_passes_over_a_teacher_s_rest_compile_too():
    for softcap in (None, 8.0):
        case = known("torch", v=9000, options={"softcap": softcap})
        result = compare_topk(case, softcap=softcap, backend="torch_compiled")
        assert max(result.hidden_error, result.weight_error) <= 1e-5 and result.loss_error <= 1e-6


def test_without_a_compiler_the_compiled_passes_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(planning, "_no_compiler", lambda: "torch.compile finds no C++ compiler")
    with pytest.raises(ValueError, match=r"'torch_compiled' is not available: torch.compile finds no"):
        linear_divergence(*make_pair().tensors, backend="torch_compiled")
