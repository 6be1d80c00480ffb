"""Packed rows through torch's variable-length attention: what the kernel is asked for, by a stand-in on the CPU.

Separate from test_batching.py because the kernel needs a GPU. The stand-in takes the kernel's arguments, refuses what
the kernel refuses, and computes each sequence with a mask of its own. test_varlen_gpu.py runs the kernel itself.
"""

from __future__ import annotations

import gc
import inspect
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config
from transformers.integrations import flash_attention

from atesd.models.attention import packed
from atesd.models.attention.packed import (
    half_precision,
    packed_eager_forward,
    packed_flash_forward,
    packed_sdpa_forward,
    use_packed_attention,
    varlen_serves,
)
from atesd.models.batching import hidden_rows, pack
from atesd.models.loading import load_model
from atesd.models.recompute import selective_policy
from atesd.run import Run
from atesd.trainer import Trainer

LENGTHS = (5, 1, 9, 3)
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]], [[20, 21], [22, 23, 24, 25], [26]]


class StandIn:
    """`varlen_attn` of torch 2.13, or of torch 2.11, which shares key heads unasked."""

    def __init__(self):
        self.calls = []

    @torch.autocast("cpu", enabled=False)  # which the kernel does not know
    def attend(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        self.calls.append((cu_seq_q, max_q, window_size))
        assert {x.dtype for x in (query, key, value)} <= {torch.bfloat16, torch.float16}
        assert query.shape[0] == key.shape[0] == value.shape[0] == int(cu_seq_q[-1])  # (L, heads, head_dim)
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert isinstance(max_q, int) and max_q == max_k == int(cu_seq_q.diff().max())
        left, right = window_size
        out = []
        for start, end in itertools.pairwise(cu_seq_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
            position = torch.arange(end - start)
            back = position[:, None] - position
            seen = (back <= (left if left >= 0 else end)) & (-back <= (right if right >= 0 else end))
            scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
            out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out).to(query.dtype)

    def torch_2_13(self):
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                        window_size=(-1, -1), enable_gqa=False):  # fmt: skip
            assert enable_gqa or query.shape[1] == key.shape[1], "Try setting enable_gqa=True for GQA."
            return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

        return varlen_attn

    def torch_2_11(self):
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                        window_size=(-1, -1)):  # fmt: skip
            return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

        return varlen_attn


@pytest.fixture(params=["torch_2_11", "torch_2_13"])
def kernel(request, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(packed, "varlen_attn", getattr(stand_in, request.param)())
    monkeypatch.setattr(packed, "has_varlen_kernel", lambda device: True)
    return stand_in


def ends_of(lengths):
    return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32).view(1, 1, 1, -1)


def states(heads=4, key_heads=2, head_dim=16, lengths=LENGTHS, dtype=torch.bfloat16):
    """Query, key and value that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(lengths), head_dim) for n in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator).bfloat16().to(dtype).requires_grad_() for s in shapes]


class Grouped(nn.Module):
    num_key_value_groups = 2


def one_call_a_sequence(monkeypatch):
    monkeypatch.setattr(packed, "has_varlen_kernel", lambda device: False)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_kernel_gives_every_sequence_what_a_call_of_its_own_gives(kernel, monkeypatch, scaling):
    got = packed_sdpa_forward(Grouped(), *(half := states()), ends_of(LENGTHS), scaling=scaling)[0]
    assert len(kernel.calls) == 1 and kernel.calls[0][0].tolist() == [0, 5, 6, 15, 18]
    one_call_a_sequence(monkeypatch)
    full = states(dtype=torch.float32)
    expected = packed_sdpa_forward(Grouped(), *full, ends_of(LENGTHS), scaling=scaling)[0]
    assert len(kernel.calls) == 1 and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got.backward(upstream)
    expected.backward(upstream.float())
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_a_sliding_window_counts_the_token_itself_and_may_be_shorter_than_a_sequence(kernel, window):
    got = packed_sdpa_forward(Grouped(), *states(), ends_of(LENGTHS), sliding_window=window)[0]
    expected = packed_eager_forward(Grouped(), *states(dtype=torch.float32), ends_of(LENGTHS), sliding_window=window)[0]
    assert kernel.calls
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_states_are_cast_for_the_kernel(kernel, dtype):
    full = states(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        got = packed_sdpa_forward(Grouped(), *full, ends_of(LENGTHS))[0]
        mixed = packed_sdpa_forward(Grouped(), full[0], full[1], full[2].to(dtype), ends_of(LENGTHS))[0]
    assert len(kernel.calls) == 2 and got.dtype == dtype
    assert torch.equal(got, mixed)
    assert torch.equal(got, packed_sdpa_forward(Grouped(), *states(dtype=dtype), ends_of(LENGTHS))[0])


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"dtype": torch.float32}, {}),
        ({"head_dim": 12}, {}),
        ({"head_dim": 264}, {}),
        ({}, {"dropout": 0.5}),
    ],
    ids=["float32", "no multiple of 8", "more than 256", "dropout"],
)
def test_what_the_kernel_does_not_serve_is_one_call_a_sequence(kernel, monkeypatch, changed, options):
    torch.manual_seed(0)
    got = packed_sdpa_forward(Grouped(), *states(**changed), ends_of(LENGTHS), **options)[0]
    one_call_a_sequence(monkeypatch)
    torch.manual_seed(0)
    expected = packed_sdpa_forward(Grouped(), *states(**changed), ends_of(LENGTHS), **options)[0]
    assert not kernel.calls
    assert torch.equal(got, expected)


def test_values_of_another_dimension_and_float64_are_not_served(kernel):
    query, key, value = states()
    assert varlen_serves(query, key, value, {"dropout": 0.0})
    assert not varlen_serves(query, key, value[..., :8], {})
    with torch.autocast("cpu", torch.bfloat16):
        assert half_precision(*(x.double() for x in (query, key, value))) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 50.0}, "Grouped caps its attention scores"),
        ({"s_aux": torch.zeros(4)}, "Grouped has attention sink"),
    ],
    ids=["capped scores", "sinks"],
)
@pytest.mark.parametrize("mask", [ends_of(LENGTHS), None], ids=["packed", "generation"])
def test_capped_scores_and_sinks_are_refused_by_name(kernel, mask, options, message):
    with pytest.raises(ValueError, match=message):
        packed_sdpa_forward(Grouped(), *states(), mask, **options)
    assert not kernel.calls


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():  # attention that looks around
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.mul_(8)
    return model


def test_a_models_sliding_window_is_its_own(kernel):
    """Against transformers' own mask, one sequence alone."""
    model = random_model(MistralConfig(**SIZES, sliding_window=4)).eval()
    ids = list(range(20, 40))
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 9:-1].float()
        use_packed_attention(model)
        got = hidden_rows(model.model, pack([ids[:10]], [ids[10:]], "cpu")).float()
    assert [window for _, _, window in kernel.calls] == [(3, 0), (3, 0)]
    assert (got - expected).norm() < 2e-2 * expected.norm()


def test_the_layout_of_a_row_is_copied_once_for_all_layers_and_their_recomputation(kernel):
    model = random_model(Qwen3Config(**SIZES)).train()
    use_packed_attention(model)
    packed.LAYOUTS.clear()  # of rows that another test's traceback may still hold

    def gradient():
        model.zero_grad()
        kernel.calls.clear()
        hidden_rows(model.model, pack(PROMPTS, RESPONSES, "cpu")).float().square().sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    assert len(kernel.calls) == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(gradient(), expected) and expected.norm() > 0
    assert len(kernel.calls) == 4, "each layer again in backward"
    assert len({id(cumulative) for cumulative, _, _ in kernel.calls}) == 1
    kernel.calls.clear()
    gc.collect()  # a checkpoint's graph is a cycle
    assert not packed.LAYOUTS, "a layout goes with its row"


def test_two_rows_do_not_share_a_layout(kernel):
    for lengths in (LENGTHS, (10, 8)):
        got = packed_sdpa_forward(Grouped(), *states(), ends_of(lengths))[0]
        expected = packed_eager_forward(Grouped(), *states(dtype=torch.float32), ends_of(lengths))[0]
        torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)
    assert [longest for _, longest, _ in kernel.calls] == [9, 10]


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_own_kernel_takes_the_arguments_forward_and_backward(monkeypatch, window):
    """Through its shape functions, which check the call; they compute nothing."""
    monkeypatch.setattr(packed, "has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(packed, "half_precision", lambda *states: torch.bfloat16)
    meta = [x.detach().to("meta").requires_grad_() for x in states()]
    out = packed_sdpa_forward(Grouped(), *meta, ends_of(LENGTHS), scaling=0.2, sliding_window=window)[0]
    assert out.shape == (1, sum(LENGTHS), 4, 16) and out.is_meta
    out.sum().backward()
    assert [x.grad.shape for x in meta] == [x.shape for x in meta]


def test_a_cpu_has_no_variable_length_kernel():
    assert not packed.has_varlen_kernel(torch.device("cpu"))
    assert packed.takes(inspect.signature, "obj") and not packed.takes(inspect.signature, "window")


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_the_flash_path_copies_the_layout_once_and_refuses_what_would_be_dropped(monkeypatch, kind):
    seen = []

    def kernel(q, k, v, mask, *, attn_implementation, cu_seq_lens_q, max_length_q, **kwargs):
        seen.append((attn_implementation, cu_seq_lens_q, max_length_q))
        return q

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    model = random_model(Qwen3Config(**SIZES))
    model.config._attn_implementation = kind
    use_packed_attention(model)
    with torch.no_grad():
        hidden_rows(model.model, pack(PROMPTS, RESPONSES, "cpu"))
    assert [(name, longest) for name, _, longest in seen] == [(kind, 7)] * 2
    assert seen[0][1] is seen[1][1] and seen[0][1].tolist() == [0, 5, 10, 17]
    layer, ends = model.model.layers[0].self_attn, ends_of(LENGTHS)
    with pytest.raises(ValueError, match="Qwen3Attention has attention sinks"):
        packed_flash_forward(layer, *states(), ends, s_aux=torch.zeros(4))
    if kind == "flash_attention_2":
        packed_flash_forward(layer, *states(), ends, dropout=0.1)
    else:
        with pytest.raises(ValueError, match="Qwen3Attention drops attention weights out in training"):
            packed_flash_forward(layer, *states(), ends, dropout=0.1)


@pytest.mark.parametrize("kind", ["sdpa", "flash_attention_2", "flash_attention_3"])
def test_a_run_tries_its_attention_in_a_precision_that_the_kernel_has(tiny_config, monkeypatch, kind):
    class Tried(Exception):
        pass

    def tried(model):
        raise Tried(torch.is_autocast_enabled("cpu"))

    model = load_model(tiny_config())
    monkeypatch.setattr("atesd.config.checks.find_spec", lambda name: name)
    monkeypatch.setattr("atesd.run.check_kernels", lambda config: None)
    monkeypatch.setattr("atesd.run_parts.load_model", lambda config: model)
    monkeypatch.setattr("atesd.models.student.check_packing", tried)
    with pytest.raises(Tried, match=str(kind != "sdpa")):
        Trainer(Run.build(tiny_config(attn_implementation=kind, bf16=True)))


def test_selective_checkpointing_keeps_what_the_kernel_returns():
    """torch's operator, with kernels for the CPU in the place of the GPU's."""
    calls, ends = [], torch.tensor([0, 3, 5], dtype=torch.int32)

    def forward(query, key, value, *arguments, **options):
        calls.append("forward")
        return query * 2, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), query.new_zeros(2)

    def backward(grad, query, key, value, *arguments, **options):
        calls.append("backward")
        return grad * 2, torch.zeros_like(key), torch.zeros_like(value)

    def attend(states):
        varlen = torch.ops.torch_attn._varlen_attn
        return varlen(states, states, states, ends, ends, 3, 3)[0].square()

    states = torch.arange(20.0).view(5, 2, 2).requires_grad_()
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        contexts = partial(create_selective_checkpoint_contexts, selective_policy)
        checkpoint(attend, states, use_reentrant=False, context_fn=contexts).sum().backward()
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(states.grad, 8 * states)
