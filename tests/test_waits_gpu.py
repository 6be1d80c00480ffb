"""The waits test_waits.py counts on a CPU, as CUDA itself reports them. `pytest --noconftest` runs this file alone.

torch's sync debug mode sees what waits for the GPU within torch: values read, sizes that depend on values, and copies
to and from pageable memory.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import assert_same_responses, hidden_rows, pack
from atesd.objectives import Distillation, Mixed, PolicyGradient, ResponseTokens, TokenTotals
from atesd.reports.metrics import PhaseTimer
from atesd.rollout import hf
from atesd.rollout.hf import HFEngine
from atesd_kernels.integrations.head import hidden_states_and_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21]]
READ = [[5, 6, 7, 30, 31], [8, 9, 10], [16, 17, 32], [18, 19, 20, 21, 33, 34]]
RESPONSES = [[40, 41, 42], [43], [44, 45, 46, 47, 48], [49, 50]]
WAIT = "called a synchronizing CUDA operation"


class Tokens:
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2


@pytest.fixture
def model():
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda()
    use_packed_attention(model)
    return model


@contextlib.contextmanager
def sync_debug_mode(mode):
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def autocast(bf16):
    return torch.autocast("cuda", torch.bfloat16, enabled=bf16)


def waits(function):
    """What `function` returns, and where it waited."""
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        result = function()
    return result, [f"{w.filename}:{w.lineno}" for w in caught if WAIT in str(w.message)]


def test_cuda_reports_the_waits_this_file_counts():
    x = torch.arange(4, device="cuda")
    for wait in (
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: bool(x.any()),
        lambda: torch.tensor([1, 2], device="cuda"),
    ):
        assert waits(wait)[1]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_packing_and_the_hidden_states_wait_for_nothing(model, bf16):
    def rows():
        student, teacher = pack(PROMPTS, RESPONSES, "cuda"), pack(READ, RESPONSES, "cuda")
        assert_same_responses(student, teacher)
        with autocast(bf16):
            return hidden_rows(model.model, student), hidden_rows(model.model, teacher)

    rows()  # libraries wait while they load
    with sync_debug_mode("error"):
        got = rows()
    assert all(x.shape == (11, 64) and x.isfinite().all() for x in got)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_micro_batch_with_its_loss_backward_and_statistics_waits_for_nothing(model, bf16):
    backbone, head = hidden_states_and_head(model)
    objective = Mixed(Distillation(position_halflife=4.0), PolicyGradient())
    timer, totals = PhaseTimer(), TokenTotals()
    loss = torch.zeros((), device="cuda")

    def micro_batch():
        student, teacher = pack(PROMPTS, RESPONSES, "cuda"), pack(READ, RESPONSES, "cuda")
        assert_same_responses(student, teacher)
        with autocast(bf16):
            with timer.phase("teacher"), torch.no_grad():
                teacher_hidden = hidden_rows(backbone, teacher)
            with timer.phase("student"):
                student_hidden = hidden_rows(backbone, student)
            with timer.phase("loss_backward"):
                tokens = ResponseTokens(student.targets, student.lengths, (1.0, -1.0, 0.5, -0.5))
                states = student_hidden.detach().requires_grad_()
                part_loss, stats = objective(states, head, teacher_hidden, None, tokens, 11)
                with torch.autocast("cuda", enabled=False):
                    part_loss.backward()
                    student_hidden.backward(states.grad)
        loss.add_(part_loss.detach())
        totals.add(stats)

    micro_batch()  # kernels are compiled and tuned
    with sync_debug_mode("error"):
        micro_batch()
    assert loss.isfinite() and model.model.embed_tokens.weight.grad.isfinite().all()
    assert set(timer.take()) == {"seconds_teacher", "seconds_student", "seconds_loss_backward"}


@pytest.mark.parametrize("prompts", [PROMPTS, [p[:2] for p in PROMPTS]], ids=["padded", "of one length"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_decoding_waits_once_every_few_tokens(model, prompts, bf16):
    def decode(length):
        engine = HFEngine(model, Tokens, max_completion_length=length, top_k=20, top_p=0.9, bf16=bf16)
        engine.stop_ids = [-1]
        rollouts = engine.generate(prompts)
        assert all(len(r.response_ids) == length for r in rollouts)

    decode(64)
    (_, short), (_, long) = waits(lambda: decode(32)), waits(lambda: decode(64))
    print(f"waits: {len(short)} for 32 tokens, {len(long)} for 64\n" + "\n".join(sorted(set(short))))
    assert len(long) - len(short) <= 32 / hf.CHECK_INTERVAL
    assert len(short) <= 32 / hf.CHECK_INTERVAL + 20, sorted(short)  # prompts, results, generate's own checks


def test_responses_are_those_of_a_loop_that_looks_at_every_token(model):
    def responses(runs_ahead):
        engine = HFEngine(model, Tokens, max_completion_length=48)
        engine.stop_ids, engine.runs_ahead = list(range(2, 40)), runs_ahead
        return engine.generate(PROMPTS)

    assert responses(True) == responses(False)


def test_a_phase_is_charged_for_its_own_work_on_the_gpu():
    timer = PhaseTimer()
    x = torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    with timer.phase("long"):
        for _ in range(40):
            x @ x
    with timer.phase("short"):
        pass
    seconds = timer.take()
    assert seconds["seconds_long"] > 10 * seconds["seconds_short"] >= 0
