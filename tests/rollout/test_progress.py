"""Long phases move per response, whichever engine generates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd import terminal
from atesd.rollout import hf, vllm_server
from atesd.rollout.hf import HFEngine
from atesd.run import Run
from atesd.trainer import Trainer

PROMPTS = [[5, 6, 7], [8, 40, 41], [9, 10], [11, 12, 13, 14]]


def moves_of(module, monkeypatch):
    """What the engine in `module` counts, as (responses, note)."""
    moves = []
    monkeypatch.setattr(module, "advance", lambda responses=0, note="": moves.append((responses, note)))
    return moves


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["cpu", "as on a gpu"])
def test_the_decoding_loop_counts_each_response_once_and_tells_the_token(tiny_model_path, monkeypatch, runs_ahead):
    moves = moves_of(hf, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    engine = HFEngine(model, AutoTokenizer.from_pretrained(tiny_model_path), max_completion_length=20)
    engine.runs_ahead = runs_ahead
    rollouts = engine.generate(PROMPTS)
    assert sum(count for count, _ in moves) == len(rollouts)
    assert moves[0][1] == f"token {hf.CHECK_INTERVAL if runs_ahead else 1} of 20"


def test_a_server_s_answers_are_counted_and_failed_ones_are_not(connect, server, monkeypatch):
    moves = moves_of(vllm_server, monkeypatch)
    engine = connect(retries=1)
    engine.sync()
    server.statuses = [503]
    assert len(engine.generate(PROMPTS)) == 4
    assert [count for count, _ in moves].count(1) == 4


def test_a_run_counts_its_rollouts_and_evaluations(tiny_config, monkeypatch):
    """In a step and before the first one, with the phase's name."""
    phases, counted = [], {}

    def advance(responses=0, note=""):
        name = terminal.shown.phase
        counted[name] = counted.get(name, 0) + responses
        phases.append(name)

    monkeypatch.setattr(hf, "advance", advance)
    run = Run.build(tiny_config(max_steps=2, num_eval_problems=3, eval_steps=2, eval_k=2))
    Trainer(run).train()
    run.close()
    assert phases[0] == "evaluation"
    assert counted == {"evaluation": 2 * 3 * 2, "rollouts": 2 * 4}
    assert terminal.shown.responses is None
