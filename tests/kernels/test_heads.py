"""A teacher's head that is near the student's, as a frozen copy is while the student trains its own: products in fp32,
and the accuracy of a shared head."""

import pytest
import torch

from atesd_kernels import linear_divergence
from atesd_kernels.backends import matmul
from atesd_kernels.backends.logit_source import NEAR_HEAD

from .cases import BACKENDS, DEVICE, compare, make_pair, size

NEAR, FAR = 0.9 * NEAR_HEAD, 1.1 * NEAR_HEAD
TORCH = [backend for backend in BACKENDS if backend != "triton"]


def pair_of(share: float, shape: dict, scale: float = 0.05):
    """Heads whose rows differ by `share` of the median norm of the student's."""
    pair = make_pair(**shape, scale=scale)
    change = torch.randn(pair.student_weight.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    change *= share * pair.student_weight.norm(dim=1).median() / change.norm(dim=1, keepdim=True)
    pair.teacher_weight = pair.student_weight + change
    return pair


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", (0.0, 1e-4, NEAR, FAR))
@pytest.mark.parametrize("scale", (0.007, 0.2))  # mean KLs of about 1e-4 and 0.1
def test_heads_that_are_near_and_just_not_give_the_oracle_s_gradients(scale, share, backend):
    result = compare(pair_of(share, size(backend), scale), backend=backend)
    assert result.loss_error <= 1e-6 and result.hidden_error <= 1e-5 and result.weight_error <= 1e-5


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize(
    "options",
    (
        {"softcap": 5.0}, {"temperature": 0.7, "teacher_temperature": 1.3}, {"temperature": 2.0},
        {"divergence": "jsd", "entry_clip": 0.02}, {"divergence": "total_variation"},
    ),
    ids=str,
)  # fmt: skip
def test_all_that_a_loss_can_do_is_done_with_near_heads(options, backend):
    result = compare(pair_of(NEAR, size(backend)), backend=backend, **options)
    assert result.loss_error <= 1e-6 and result.hidden_error <= 1e-5 and result.weight_error <= 1e-5


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of the logits, in the order of the products."""
    dtypes, product = [], matmul.logits
    monkeypatch.setattr(matmul, "logits", lambda *a, **options: dtypes.append(a[2]) or product(*a, **options))
    return dtypes


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize(
    "share, dtype, options",
    (
        (NEAR, torch.float32, {}), (FAR, torch.float64, {}),
        (NEAR, torch.float64, {"logits_dtype": torch.float64}),
        (NEAR, torch.float64, {"student_bias": torch.zeros(1009)}),
    ),
)  # fmt: skip
def test_only_heads_that_are_near_do_without_fp64(share, dtype, options, backend, seen):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    linear_divergence(*pair_of(share, size(backend)).tensors, backend=backend, **options)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("backend", TORCH)
def test_one_block_that_is_not_near_ends_it_and_changes_nothing(backend, monkeypatch, seen):
    monkeypatch.setattr("atesd_kernels.planning.CPU_BLOCK_COLUMNS", 100)
    pair = pair_of(1e-4, size(backend))
    pair.teacher_weight[350:360] += 0.01  # by 0.07, where a row's norm is 2.1
    result = compare(pair, backend=backend)
    assert result.loss_error <= 1e-6 and result.hidden_error <= 1e-5 and result.weight_error <= 1e-5
    assert seen[:3] == [torch.float32] * 3 and set(seen[3:]) == {torch.float64}
