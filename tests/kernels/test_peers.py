"""With matching options the values are those of torch, TRL and Liger, to rounding."""

import pytest
import torch
import torch.nn.functional as F

from atesd_kernels import divergence, linear_divergence

from .cases import DEVICE, make_pair

BETAS = (0.0, 0.3, 0.5, 1.0)


def dense(pair, temperature=1.0):
    return [(h @ pair.student_weight.T) / temperature for h in (pair.student_hidden, pair.teacher_hidden)]


def test_forward_kl_is_torch_s_kl_div():
    pair = make_pair(scale=0.3)
    s, t = dense(pair)
    expected = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
    assert linear_divergence(*pair.tensors).item() == pytest.approx(expected.item(), rel=1e-4)
    assert divergence(s, t).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_trl_s_generalized_jsd_loss(beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl is not installed")
    pair = make_pair(scale=0.3)
    s, t = dense(pair)
    labels = torch.arange(67, device=DEVICE) % 4
    labels[labels == 0] = -100
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        s[None], t[None], labels=labels[None], beta=beta, temperature=1.3, reduction="batchmean"
    )
    value = linear_divergence(*pair.tensors, divergence="jsd", beta=beta, temperature=1.3, mask=labels != -100)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_liger_s_fused_linear_jsd(beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    pair = make_pair(scale=0.3)
    loss = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.3, compiled=False
    )
    labels = torch.zeros(67, dtype=torch.long, device=DEVICE)
    expected = loss(pair.student_hidden, pair.student_weight, pair.teacher_hidden, pair.student_weight, labels)
    expected = expected[0] if isinstance(expected, tuple) else expected
    value = linear_divergence(*pair.tensors, divergence="jsd", beta=beta, temperature=1.3)
    # Liger multiplies by no T^2 either
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
