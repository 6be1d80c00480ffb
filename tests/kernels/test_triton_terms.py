"""Functions of one entry that the Triton kernels compute by formulas of their own, against float64."""

import pytest
import torch

from atesd_kernels import planning

from .cases import DEVICE

if planning.unavailable("triton", DEVICE):
    pytest.skip(planning.unavailable("triton", DEVICE), allow_module_level=True)

import triton
import triton.language as tl

from atesd_kernels.kernels import bounded


@triton.jit
def log_mixtures(E, LOG, BEND, BETA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, log, bend = bounded.log_mixture(tl.load(E + at), BETA)
    tl.store(LOG + at, log)
    tl.store(BEND + at, bend)


@pytest.mark.parametrize("beta", (0.01, 0.5, 0.9, 0.99))
def test_the_logarithm_of_a_mixture_and_its_bend_are_exact_for_every_difference(beta):
    """From e = expm1(x), as near 0 as 1e-8 and as far as the kernels use this form, x in [-60, 40)."""
    small = 10 ** torch.linspace(-8, 0, 4096, dtype=torch.float64)
    x = torch.cat([torch.linspace(-60, 39.9, 8192, dtype=torch.float64), small, -small])
    e = torch.expm1(x).float()
    log, bend = torch.empty_like(e, device=DEVICE), torch.empty_like(e, device=DEVICE)
    log_mixtures[(len(e) // 1024,)](e.to(DEVICE), log, bend, beta, 1024)
    y = (torch.tensor(beta) * e).double()  # the product is rounded once; what follows it is tested
    expected = torch.log1p(y)
    tiny = y.abs() < 1e-3
    expected_bend = torch.where(tiny, -(y**2) / 2 + y**3 / 3 - y**4 / 4 + y**5 / 5, expected - y)
    assert ((log.cpu() - expected) / expected).abs().max() < 2e-7
    assert ((bend.cpu() - expected_bend) / expected_bend).abs().max() < 1e-6
