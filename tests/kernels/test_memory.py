"""Extra memory is the chunk and the results, whatever the number of tokens: every allocation of a call is counted."""

import pytest
import torch

from atesd_kernels import linear_divergence, linear_logprobs, planning

from .cases import DEVICE, make_pair

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
VOCAB, HIDDEN, CHUNK = 3000, 16, 8 * 3000 * 50
TOKENS = (100, 1000)


def forward_and_backward(tokens: int, dtype, loss: str, views=None, scale=0.05, **options):
    pair = make_pair(tokens, HIDDEN, VOCAB, scale=scale, dtype=dtype, views=views)
    hidden = pair.student_hidden.requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.long)

    def run():
        hidden.grad = None
        if loss == "logprobs":
            value = linear_logprobs(hidden, pair.student_weight, targets, chunk_bytes=CHUNK, **options)
        else:
            value = linear_divergence(
                *pair.tensors, teacher_mix=pair.teacher_mix, divergence=loss, chunk_bytes=CHUNK, **options
            )
        value.mean().mul(3.0).backward()

    return run


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "loss, options",
    (
        ("forward_kl", {}), ("forward_kl", {"reduction": "none"}), ("jsd", {"entry_clip": 1e-3}), ("logprobs", {}),
        ("forward_kl", {"scale": 12.0}), ("jsd", {"scale": 12.0}),
        ("forward_kl", {"views": (None, None)}), ("forward_kl", {"views": (None, None), "softcap": 8.0}),
        ("forward_kl", {"views": (20, None, 16)}), ("jsd", {"views": (20, None, 16), "softcap": 8.0}),
    ),
)  # fmt: skip
def test_peak_memory_is_the_chunk_and_the_results_whatever_the_tokens(
    loss, options, dtype, backend, monkeypatch, peak_bytes
):
    if planning.unavailable(backend, DEVICE):
        pytest.skip(planning.unavailable(backend, DEVICE))
    monkeypatch.setattr(planning, "CPU_BLOCK_COLUMNS", 500)  # blocks and tiles to a small chunk's measure
    monkeypatch.setattr(planning, "CPU_TILE_ROWS", 25)
    per_row = 200  # bytes: values, weights, indices; a row's hidden states in fp32 are 64, its logits 12,000
    for tokens in TOKENS:
        gradient = tokens * HIDDEN * dtype.itemsize
        peak = peak_bytes(forward_and_backward(tokens, dtype, loss, backend=backend, **options))
        # beside the chunk: one block's product, and the passes' tiles over it
        assert 0.5 * CHUNK < peak - gradient - per_row * tokens < 1.2 * CHUNK, (tokens, peak, gradient)


def test_the_count_sees_what_is_inside_an_operator(peak_bytes):
    assert peak_bytes(lambda: torch.zeros(1000, 1000).softmax(1)) == 8_000_000


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_backward_scales_the_gradient_where_it_lies_unless_the_graph_is_kept(reduction, peak_bytes):
    pair = make_pair(200, 1000, 50)
    hidden = pair.student_hidden.requires_grad_()
    losses = [linear_divergence(*pair.tensors, reduction=reduction).mean() * 3.0 for _ in range(4)]
    size = hidden.numel() * hidden.element_size()

    def backward(**options):
        hidden.grad = None
        losses.pop().backward(**options)

    assert peak_bytes(lambda: backward(retain_graph=True)) >= size
    assert peak_bytes(backward) < 0.1 * size
