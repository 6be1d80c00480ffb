"""`pytest bench`: memory, gradient error over mean KL, the GEMM floor, scaling and the whole step, with the claims they
are there to show."""

from __future__ import annotations

import pytest

from atesd_kernels.planning import DEFAULT_CHUNK_BYTES
from bench import accuracy_vs_kl, attention_speed, gemm_share, memory, scaling, step_vs_trl, topk_speed
from bench.entrants import DEVICE, DTYPES, OURS
from bench.machine import native_precision
from bench.shapes import HERE


def test_memory_is_flat_in_tokens(full):
    if full:
        results = memory.main(full=True)
    else:  # bf16 peers take minutes where the processor has no instructions for it
        dtypes = [dtype for dtype in DTYPES if dtype in ("fp32", native_precision())]
        results = [
            memory.run(memory.TOKENS[:2], memory.TOKENS[:1], compiled=False, shape=s, dtypes=dtypes) for s in HERE[:1]
        ]
    if DEVICE == "cpu":
        for row in (r for result in results for r in result["rows"] if r["entrant"] == OURS):
            gradient = row["tokens"] * HERE[0].hidden * DTYPES[row["dtype"]].itemsize
            # whatever N: the chunk, and small change
            assert row["extra_bytes"] - gradient < DEFAULT_CHUNK_BYTES["cpu"] + 48 * memory.MIB


def test_bf16_gradients_stay_right_where_teacher_and_student_nearly_agree(full):
    result = accuracy_vs_kl.main() if full else accuracy_vs_kl.main(4, 16, alphas=(0.0, 1.0), mean_kls=(1e-3, 1e-2))
    for row in result["rows"]:
        assert row[f"{OURS} bf16"]["gradient"] < 5e-3


def test_share_of_the_gemm_floor(full):
    quick = {
        "tokens": gemm_share.TOKENS // 4,  # as the losses: their inputs are made once
        "rounds": 3,
        "dtypes": (native_precision(),),
        "losses": ("forward_kl",),
        "phases": gemm_share.PHASES[:1],
        "budget": 30,
    }
    for result in gemm_share.main(**({} if full else quick)):
        measured = {row["backend"] for row in result["rows"]}
        assert measured | set(result["not_run"]) >= set(gemm_share.BACKENDS), "a backend is neither measured nor named"


def test_top_k_of_a_teacher(full):
    result = topk_speed.main(**({} if full else {"tokens": 256, "rounds": 1, "dtypes": (native_precision(),)}))
    for row in (r for r in result["rows"] if r["entrant"] == OURS):
        assert row["error"] < (1e-4 if row["dtype"] == "fp32" else 1e-2)


def test_attention_of_a_sequence(full):
    result = attention_speed.main(**({} if full else {"lengths": (64, 256), "rounds": 3}))
    assert {row["phase"] for row in result["rows"]} == {*attention_speed.PHASES, attention_speed.DECODED}


def test_scaling(full):
    result = scaling.main() if full else scaling.main(scaling.QUICK, rounds=1)
    ours = scaling.lines(result, "seconds")["tokens", OURS]
    assert scaling.exponent(*map(list, zip(*ours, strict=True))) < 1.3, "the loss is worse than linear in its tokens"


@pytest.mark.parametrize("precision", DTYPES)
def test_whole_step(full, precision):
    if not full or precision not in ("fp32", native_precision()):
        pytest.skip("only with --full, in fp32 and in what the machine trains fastest in")
    step_vs_trl.main(["--precision", precision])
