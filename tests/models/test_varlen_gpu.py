"""torch's variable-length attention on a GPU: packed rows against each sequence alone, forward and backward.

Needs no fixture, no download and no other test file, so that a machine with a GPU can run it with `--noconftest`.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from atesd.models.attention import packed as packed_attention
from atesd.models.attention.packed import (
    check_packing,
    has_varlen_kernel,
    packed_eager_forward,
    packed_sdpa_forward,
    use_packed_attention,
)
from atesd.models.batching import hidden_rows, pack

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (GPU and has_varlen_kernel(torch.device("cuda", 0))),
        reason="needs a GPU from Ampere on",
    ),
]
CUDA = torch.device("cuda", 0)
LENGTHS = (37, 1, 300, 129, 64)


class Grouped(nn.Module):
    num_key_value_groups = 2


def ends_of(lengths):
    return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32).view(1, 1, 1, -1)


def states(head_dim, dtype=torch.bfloat16):
    """Query, key and value that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(LENGTHS), head_dim) for n in (4, 2, 2)]
    return [torch.randn(s, generator=generator).bfloat16().to(CUDA, dtype).requires_grad_() for s in shapes]


@pytest.fixture
def calls(monkeypatch):
    """The windows of the kernel's calls."""
    windows, kernel = [], packed_attention.varlen_attn

    @functools.wraps(kernel)  # which keeps its signature
    def counted(*args, window_size, **kwargs):
        windows.append(window_size)
        return kernel(*args, window_size=window_size, **kwargs)

    monkeypatch.setattr(packed_attention, "varlen_attn", counted)
    return windows


def one_call_a_sequence(monkeypatch):
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda device: False)


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("window", [None, 1, 50, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernel_attends_like_a_written_out_attention_of_each_sequence(calls, head_dim, window):
    full, half = states(head_dim, torch.float64), states(head_dim)
    expected = packed_eager_forward(Grouped(), *full, ends_of(LENGTHS), scaling=0.2, sliding_window=window)[0]
    got = packed_sdpa_forward(Grouped(), *half, ends_of(LENGTHS), scaling=0.2, sliding_window=window)[0]
    assert len(calls) == 1 and got.dtype == torch.bfloat16
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(CUDA)
    expected.backward(upstream.double())
    got.backward(upstream)
    assert relative(got, expected) < 1e-2
    for a, b in zip(half, full, strict=True):
        assert relative(a.grad, b.grad) < 2e-2 or b.grad.norm() < 1e-6  # a window of 1 leaves query and key no gradient


def test_a_call_under_autocast_is_the_call_in_bfloat16(calls):
    with torch.autocast("cuda", torch.bfloat16):
        got = packed_sdpa_forward(Grouped(), *states(64, torch.float32), ends_of(LENGTHS))[0]
    assert torch.equal(got, packed_sdpa_forward(Grouped(), *states(64), ends_of(LENGTHS))[0])
    assert len(calls) == 2
    packed_sdpa_forward(Grouped(), *states(64, torch.float32), ends_of(LENGTHS))
    assert len(calls) == 2, "float32 is one call a sequence"


def test_the_host_does_not_wait_for_the_gpu():
    inputs, rows = states(64), [ends_of(LENGTHS) for _ in range(2)]

    def attend(ends):
        for _ in range(2):  # layers
            packed_sdpa_forward(Grouped(), *inputs, ends)[0].square().mean().backward()

    attend(rows[0])  # warm: what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(rows[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_model(**changed):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changed,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for p in model.parameters():  # attention that looks around
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.mul_(3)
    return model.to(CUDA)


def sequences():
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, 300, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(n) for n in (30, 5, 150)], [draw(n) for n in (100, 17, 200)]


def alone(model, dtype):
    """Loss and gradients, one sequence at a time without packing, by transformers' own masks."""
    model.zero_grad()
    states = []
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        for prompt, response in zip(*sequences(), strict=True):
            ids = torch.tensor([prompt + response], device=CUDA)
            states.append(model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1])
    return finished(model, torch.cat(states))


def packed(model, dtype):
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        states = hidden_rows(model.model, pack(*sequences(), CUDA))
    return finished(model, states)


def finished(model, states):
    upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(3)).to(CUDA)
    (states.float() * upstream).sum().backward()
    grads = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None]
    return states.detach().float(), torch.cat(grads).clone()


@pytest.mark.parametrize("window", [None, 40], ids=["full", "sliding window"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_packed_row_of_qwen3_loses_no_more_in_bfloat16_than_its_sequences_alone(calls, window, recompute):
    """Both against float32. One layer of three has the window, the others see everything."""
    changed = {} if window is None else {
        "use_sliding_window": True, "sliding_window": window, "max_window_layers": 2,
    }  # fmt: skip
    model = random_model(**changed).train()
    expected = alone(model, torch.float32)
    limits = [2 * relative(a, b) for a, b in zip(alone(model, torch.bfloat16), expected, strict=True)]
    model = copy.deepcopy(model)
    use_packed_attention(model)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = packed(model, torch.bfloat16)
    assert calls.count((-1, 0)) == (2 if window else 3) * (2 if recompute else 1)
    assert len(calls) == (6 if recompute else 3)
    errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
    assert errors[0] < limits[0] < 0.1 and errors[1] < limits[1] < 0.2, (errors, limits)


def test_the_varlen_row_and_one_call_a_sequence_give_the_same_step(calls, monkeypatch):
    model = random_model().train()
    use_packed_attention(model)
    got = packed(model, torch.bfloat16)
    assert len(calls) == 3
    one_call_a_sequence(monkeypatch)
    by_sequence = packed(model, torch.bfloat16)
    assert len(calls) == 3
    errors = [relative(a, b) for a, b in zip(got, by_sequence, strict=True)]
    assert errors[0] < 2e-2 and errors[1] < 4e-2, errors


def test_a_bfloat16_model_passes_the_check_of_its_packing(calls):
    model = random_model().to(torch.bfloat16)
    use_packed_attention(model)
    check_packing(model)
    assert len(calls) == 9  # one row of both sequences, and each of them alone
