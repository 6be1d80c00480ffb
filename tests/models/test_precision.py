"""Which precision a run takes where its settings leave it open, and that each works on a processor without bf16."""

import pytest
import torch

from atesd.config import load_config
from atesd.models import precision
from atesd_kernels import linear_divergence
from atesd_kernels.backends import matmul


@pytest.mark.parametrize("fast", [True, False])
def test_the_quickstart_takes_bf16_where_the_processor_multiplies_it(monkeypatch, tmp_path, fast):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: fast)
    config = load_config("quickstart", [])
    precision.settle_precision(config)
    assert config.bf16 is fast
    again = load_config(str(config.save(tmp_path)), [])
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: not fast)
    precision.settle_precision(again)
    assert again.bf16 is fast, "a run goes on in the precision it began in"


@pytest.mark.parametrize("flag", ["--bf16", "--bf16=false"])
def test_a_flag_overrides_the_processor(monkeypatch, flag):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: flag != "--bf16")
    config = load_config("quickstart", [flag])
    precision.settle_precision(config)
    assert config.bf16 is (flag == "--bf16")


@pytest.mark.parametrize("capability", precision.CPU_INSTRUCTIONS)
def test_bf16_is_fast_on_a_cpu_with_instructions_for_it(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {"avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert not precision.has_fast_bf16()
    found[capability] = True
    assert precision.has_fast_bf16()


@pytest.mark.parametrize("trained_head", [False, True])
def test_bf16_inputs_lose_nothing_on_a_cpu_without_bf16_products(monkeypatch, trained_head):
    torch.manual_seed(0)
    student, weight = torch.randn(37, 24).bfloat16(), (torch.randn(301, 24) / 5).bfloat16()
    teacher = (student + torch.randn(37, 24) / 20).bfloat16()
    gradients = {}
    for products in (True, False):
        monkeypatch.setattr(matmul, "_BF16_PRODUCTS", products)
        hidden, head = student.clone().requires_grad_(), weight.clone().requires_grad_(trained_head)
        linear_divergence(hidden, head, teacher, backend="torch").backward()
        gradients[products] = [hidden.grad.double()] + ([head.grad.double()] if trained_head else [])
    hidden, head = student.double().requires_grad_(), weight.double().requires_grad_(trained_head)
    linear_divergence(hidden, head, teacher.double()).backward()
    exact = [hidden.grad] + ([head.grad] if trained_head else [])
    for with_products, without, true in zip(gradients[True], gradients[False], exact, strict=True):
        errors = [((g - true).norm() / true.norm()).item() for g in (without, with_products)]
        assert errors[0] <= min(errors[1], 2.5e-3)  # bf16 gradients are themselves rounded to 2^-9


def fp32_error(run) -> float:
    x, w = torch.randn(2, 512, 576, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ w.double().T
    return (torch.dist(run(x, w).double(), exact) / exact.norm()).item()


def test_fast_fp32_products_are_fp32_products():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with precision.fast_fp32_products(torch.device("cpu")):
        assert fp32_error(lambda x, w: x @ w.T) < 1e-6
        allowed = torch.backends.mkldnn.matmul.fp32_precision
    assert (allowed == "bf16") is matmul.onednn_keeps_fp32()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(not matmul.onednn_keeps_fp32(), reason="torch's own products are used on this processor")
def test_a_processor_that_rounds_fp32_where_it_may_is_not_allowed_to(monkeypatch):
    real = torch.mm

    def rounding(x, w, **options):
        if x.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            x, w = x.bfloat16().float(), w.bfloat16().float()
        return real(x, w, **options)

    monkeypatch.setattr(torch, "mm", rounding)
    matmul.onednn_keeps_fp32.cache_clear()
    try:
        assert not matmul.onednn_keeps_fp32()
        with precision.fast_fp32_products(torch.device("cpu")):
            assert fp32_error(lambda x, w: torch.mm(x, w.T)) < 1e-6
    finally:
        matmul.onednn_keeps_fp32.cache_clear()
