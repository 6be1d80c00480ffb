"""A server that holds the teacher, really started: its scores are those of the same model in the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atesd.rollout import RolloutError
from atesd.run import Run
from atesd.trainer import Trainer

from .cases import BF16
from .servers import Server, Servers

TOP = 64  # tokens that the server gives of each position


@pytest.fixture
def server(smollm2_dir: Path, tmp_path) -> Iterator[Server]:
    """Without --enable-lora: such a server of vLLM's CPU build dies when it scores two passages in one batch."""
    one = Servers(smollm2_dir, tmp_path, "--max-logprobs", str(TOP))
    try:
        yield from one.lend()
    finally:
        one.kill()


@pytest.mark.model
def test_a_model_behind_the_server_teaches_as_it_does_here_but_for_what_its_top_tokens_leave_out(
    real_config, server, smollm2_dir, tmp_path, capfd
):
    found = {}
    local = {"teacher": "model", "teacher_model_name_or_path": str(smollm2_dir)}
    local["teacher_weights"] = "bfloat16" if BF16 else "float32"
    served = {"teacher": "vllm_server", "teacher_base_url": server.url}
    common = {"rollout_engine": "hf", "scoring_temperature": 1.0, "grounding": "reference"}
    for name, teacher in {"here": local, "there": served}.items():
        trainer = Trainer(Run.build(real_config(**common, **teacher, output_dir=str(tmp_path / name))))
        found[name] = trainer.train_step(0)[0]
        trainer.run.close()
    assert "not checked" not in capfd.readouterr().out, "it gives the texts of token ids"
    close = 0.1 if BF16 else 1e-3
    here, there = found["here"], found["there"]
    assert here["mismatch"] > 0.01 and there["grad_norm"] > 0
    assert 0.9 * here["mismatch"] - close < there["mismatch"] < here["mismatch"] + close, found
    assert there["grounded_score"] == pytest.approx(here["grounded_score"], abs=close)
    assert there["top1_agreement"] == pytest.approx(here["top1_agreement"], abs=close)
    with pytest.raises(RolloutError, match=f"--max-logprobs {TOP + 1} or more, or lower teacher_top_k"):
        Run.build(real_config(**common, **served, teacher_top_k=TOP + 1, output_dir=str(tmp_path / "more")))
