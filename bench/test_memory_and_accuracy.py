"""`pytest bench`: memory over N and gradient error over mean KL, with the claims they are there to show."""

from __future__ import annotations

from atesd_kernels.planning import DEFAULT_CHUNK_BYTES
from bench import accuracy_vs_kl, memory
from bench.entrants import DTYPES, OURS


def test_memory_is_flat_in_tokens(full):
    result = memory.main(full)
    for dtype in DTYPES:
        own = [r for r in result["rows"] if (r["entrant"], r["dtype"]) == (OURS, dtype)]
        gradients = [r["tokens"] * memory.HIDDEN * DTYPES[dtype].itemsize for r in own]
        beyond = [r["extra_bytes"] - g for r, g in zip(own, gradients, strict=True)]
        # whatever N: the chunk, and small change
        assert max(beyond) < DEFAULT_CHUNK_BYTES["cpu"] + 48 * memory.MIB


def test_bf16_gradients_stay_right_where_teacher_and_student_nearly_agree():
    result = accuracy_vs_kl.main()
    for row in result["rows"]:
        assert row[f"{OURS} bf16"]["gradient"] < 5e-3
