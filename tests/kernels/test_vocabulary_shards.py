"""Heads sharded by their vocabulary, and batches sharded by their rows: ranks together are one process with the whole.

Real processes over gloo, started once for each number of ranks; `shard_rank` is what each of them computes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from atesd_kernels import DivergenceTerm, linear_divergence, linear_logprobs, reference

from .cases import DIVERGENCES, relative_l2
from .shard_cases import (
    CASES,
    FEW_ROWS,
    OWN_PAIR,
    ROW_OPTIONS,
    TOPK_OPTIONS,
    Case,
    all_cases,
    computed,
    each,
    evaluate,
    shares,
    squared,
    whole_call,
)
from .topk_cases import TAILS

ROOT = Path(__file__).parent.parent.parent
WORLDS = (2, 3)
pytestmark = pytest.mark.slow  # starting five processes is
GRADIENTS = ("hidden_grad", "weight_grad", "bias_grad")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """`ranks(world)`: what each rank wrote down. Of several test processes, one starts the ranks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "vocabulary-shards"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            start_ranks(folder)
            (folder / "done").touch()
    return cache(lambda world: [torch.load(folder / f"{world}/{rank}.pt", weights_only=False) for rank in range(world)])


def start_ranks(folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = []
    for world in WORLDS:
        shutil.rmtree(folder / str(world), ignore_errors=True)
        (folder / str(world)).mkdir()
        for rank in range(world):
            command = [
                sys.executable,
                "-m",
                "tests.kernels.shard_rank",
                str(rank),
                str(world),
                str(folder / str(world)),
            ]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)


def together(parts: list[dict]) -> dict:
    """Shares of the head's gradient side by side; what every rank has whole is the same on each."""
    first = parts[0]
    for part in parts[1:]:
        assert part["value"].equal(first["value"]) and part["hidden_grad"].equal(first["hidden_grad"])
        if first["stats"] is not None:
            for mine, other in zip(part["stats"], first["stats"], strict=True):
                assert mine is None or torch.allclose(mine, other, rtol=0, atol=0, equal_nan=True)
    cut = {n: None if first[n] is None else torch.cat([p[n] for p in parts]) for n in ("weight_grad", "bias_grad")}
    return {**first, **cut}


def of_the_oracle(case: Case) -> dict:
    """The same call over the whole head in float64."""
    call, function = whole_call(case), getattr(reference, case.function.__name__)
    call.tensors = {k: each(Tensor.double, v) for k, v in call.tensors.items()}
    unknown = {"return_stats", "chunk_bytes"} | ({"targets"} if case.function is linear_divergence else set())
    call.options = {k: v for k, v in call.options.items() if k not in unknown}
    return evaluate(function, call, lambda t: t, case.trained_head)


def true_stats(case: Case):
    call = whole_call(case)
    get = {**call.tensors, **call.options}.get
    scaling = get("softcap"), get("temperature", 1.0)
    if case.function is linear_logprobs:
        s = t = reference.logits(get("hidden"), get("weight"), get("bias"), *scaling)
    else:
        names = ("student_bias", "teacher_bias", "teacher_mix", "softcap", "temperature")
        given = {name: call.options[name] for name in names if name in call.options}
        s, t = reference.logit_pair(**call.tensors, **given)
    divergence = {k: v for k, v in call.options.items() if k in ("divergence", "beta")}
    return reference.token_stats(s, t, get("targets"), **divergence), get("mask")


@pytest.mark.parametrize(
    ("backend", "name", "world"),
    [(b, name, world) for b in CASES for name in CASES[b] for world in WORLDS if computed(b, name, world)],
)
def test_shards_of_the_vocabulary_give_what_the_whole_head_gives(ranks, backend, name, world):
    case = CASES[backend][name]
    dtype = case.pair.get("dtype", torch.float32)
    got, true = together([rank["cases"][backend, name] for rank in ranks(world)]), of_the_oracle(case)
    loss_bound = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-3, torch.float16: 1e-3}[dtype]
    if backend == "triton" and "far apart" in name:  # few tokens, whose logits reach 60: an ulp is 4e-6
        loss_bound = 2e-6
    if "far below zero" in name:  # the logits are about -100, whose ulp is 8e-6
        loss_bound = 5e-6
    bound = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    # clipped KLs are sums of both signs that may come out near zero: the whole divergence is the yardstick
    scale = true["value"].abs().mean()
    if "entry_clip" in case.options:
        whole = {k: o for k, o in case.options.items() if k != "entry_clip"}
        scale = of_the_oracle(Case(case.pair, whole))["value"]
        assert true["value"] < scale, "the clip does not bite"
    if case.function is linear_logprobs:
        assert relative_l2(got["value"], true["value"]) <= 1e-5
    else:
        assert (got["value"] - true["value"]).abs().mean() <= loss_bound * scale
    for gradient in GRADIENTS[: 1 if dtype == torch.bfloat16 else 3]:
        assert (got[gradient] is None) == (true[gradient] is None)
        if got[gradient] is not None:
            assert relative_l2(got[gradient], true[gradient]) <= bound, gradient
    if got["stats"] is not None:
        stats, mask = true_stats(case)
        for field, value in got["stats"]._asdict().items():
            expected = getattr(stats, field)
            if field == "top1_agree":
                assert value is None or value.equal(expected if mask is None else expected & mask)
            elif value is not None:
                expected = expected if mask is None else torch.where(mask, expected, 0.0)
                if field != "divergence" or case.function is linear_divergence:
                    assert relative_l2(value, expected) <= max(1e-5, loss_bound), field


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("options", TOPK_OPTIONS)
@pytest.mark.parametrize("backend", CASES)
def test_shards_of_the_vocabulary_give_the_whole_head_s_loss_against_a_top_k(ranks, backend, options, tail, world):
    results = [rank["topk"][backend, options, tail] for rank in ranks(world)]
    got, whole = together([result["shards"] for result in results]), results[0]["whole"]
    assert torch.allclose(got["value"], whole["value"], rtol=1e-6)
    for gradient in GRADIENTS:
        assert got[gradient] is whole[gradient] is None or relative_l2(got[gradient], whole[gradient]) <= 1e-5
    for mine, other in zip(got["stats"] or (), whole["stats"] or (), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, equal_nan=True)


def test_the_cases_reach_every_share_and_both_forms():
    """What the test above relies on: a target and a top token on each rank, and pairs near and far."""
    call = whole_call(all_cases()["statistics"])
    logits = reference.logits(call.tensors["student_hidden"], call.tensors["student_weight"])
    for world in WORLDS:
        ends = torch.tensor(shares(101, world)).cumsum(0)
        assert (logits.argmax(1)[:, None] >= ends).sum(1).unique().numel() >= 2
        assert (call.options["targets"][:, None] >= ends).sum(1).unique().numel() >= 2
    assert shares(101, 3)[-1] == 3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ROW_OPTIONS)
def test_a_batch_whose_rows_lie_on_several_ranks_is_the_whole_batch(ranks, name, world):
    whole = whole_call(Case({}, dict(mask="mask", token_weight="weight")))
    true = evaluate(linear_divergence, whole, lambda t: t, True, **ROW_OPTIONS[name])
    parts = [rank["rows"][name] for rank in ranks(world)]
    for part in parts:  # reduced over ranks
        assert part["value"].item() == pytest.approx(true["value"].item(), rel=1e-6)
        assert relative_l2(part["weight_grad"], true["weight_grad"]) <= 1e-6
    rows = torch.cat([part["hidden_grad"] for part in parts])
    assert relative_l2(rows, true["hidden_grad"]) <= 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_a_dtensor_head_names_its_group_and_gets_a_dtensor_gradient(ranks, world):
    call = whole_call(Case(dict(shared=False), dict(student_bias="bias", teacher_bias="other")))
    true = evaluate(reference.linear_divergence, call, lambda t: t, True)
    call = whole_call(Case({}, dict(bias="bias"), function=linear_logprobs))
    call.options["targets"] = torch.arange(13)
    call.upstream = torch.full((13,), 1 / 13)
    logprobs = evaluate(reference.linear_logprobs, call, lambda t: t, True)
    logprobs["value"] = logprobs["value"].mean()
    for rank in ranks(world):
        for got, expected in ((rank["dtensor"], true), (rank["dtensor, log-probabilities"], logprobs)):
            assert got["placements"] == ["S(0)", "S(0)"]
            assert got["value"].item() == pytest.approx(expected["value"].item(), rel=1e-6)
            assert all(relative_l2(got[name], expected[name]) <= 1e-5 for name in GRADIENTS)
        shared, view = rank["dtensor, a view"]
        assert view.equal(shared)
        for sharded, whole in rank["dtensor, exposure"]:
            torch.testing.assert_close(sharded, whole, rtol=1e-6, atol=0)


def test_a_caller_compiles_in_one_graph_over_a_sharded_head(ranks):
    for rank in ranks(2):
        for function in ("by_group", "by_dtensor"):
            (loss, grad), (eager_loss, eager_grad) = (rank["compiled"][function, eager] for eager in (False, True))
            assert loss.equal(eager_loss) and grad.equal(eager_grad) and grad.norm() > 0


REFUSED = {
    "own": r"ValueError: .*group=.* needs backend 'torch', .*'triton' or 'auto', this call asks for '.*:Own'",
    "logprobs, own": r"ValueError: .*group=.* needs backend 'torch', .*, this call asks for '.*shard_cases:Own'",
    "target": r"ValueError: targets must lie in \[0, 101\), got 101",
    "logprobs, target": r"ValueError: targets must lie in \[0, 101\), got 101",
    "a name": "TypeError: group must be a torch.distributed.ProcessGroup this rank belongs to, got '0'",
    "sharded by hidden": r"ValueError: student_weight is a DTensor .*Shard\(dim=1\).*Shard\(0\)",
    "another group": "ValueError: group= is .*, but student_weight is sharded over",
    "sharded rows": "ValueError: student_hidden is a DTensor .* every rank needs all of it",
    "no row": r"ValueError: each rank needs at least one row of the head; the ranks of group= have \[\d+, 0",
    "other rows": r"ValueError: .*needs the same hidden states on every rank, but those of the ranks of group= differ",
    "more rows": r"ValueError: .*differ \(\[13, 12",
    "other mask": r"ValueError: .*needs the same mask on every rank, but those .* count \[12, 11",
    "logprobs, other mask": r"ValueError: .*needs the same mask on every rank, but those .* count \[12, 11",
    "other options": "ValueError: .*needs the same options on every rank .* This rank has .*temperature=[123].0, ",
    "one gradient": "ValueError: .*all require a gradient, or none.* This rank has .*hidden_grad=(True|False)",
    "other GPUs": r"ValueError: .*needs GPUs of one kind for backend 'triton', .* have \[132, 131",
    "not a member": "TypeError: group must be a torch.distributed.ProcessGroup this rank belongs to",
}


@pytest.mark.parametrize("world", WORLDS)
def test_what_cannot_be_is_refused_on_every_rank(ranks, world):
    for number, rank in enumerate(ranks(world)):
        said = dict(rank["refusals"])
        assert said.pop("after") == ranks(world)[0]["refusals"]["after"]
        expected = set(REFUSED) - ({"not a member"} if number == 0 else set())
        expected -= {"other GPUs"} if "triton" not in CASES else set()
        assert set(said) == expected
        for name, message in said.items():
            assert re.search(REFUSED[name], message), message


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", CASES)
def test_ranks_exchange_a_few_numbers_a_token_and_never_logits(ranks, backend, world):
    plain, all_options, gradient = (f"gradient {g}, {n} options" for g, n in ((False, 0), (False, 3), (True, 0)))
    for rank in ranks(world):
        sent = rank["exchanged"]
        for asked in (plain, all_options, gradient):
            few, many = (sent[f"{backend}, {v}, {asked}"] for v in (101, 1009))
            assert few == many > 0, "what is exchanged grows with the vocabulary"
        sent = {asked: sent[f"{backend}, 101, {asked}"] for asked in (plain, all_options, gradient)}
        a_call = 2 * 1 + 4 + 16 + 3  # sizes, the call's numbers, the sample of the hidden states, decisions
        rows, numbers = FEW_ROWS, {"torch": (10, 20), "triton": (24, 24)}[backend]  # a program's PARTS and SUMS
        assert sent[plain] <= numbers[0] * rows + a_call
        assert sent[all_options] <= numbers[1] * rows + a_call
        # and the hidden states' gradient, which a head sharded by rows sums over ranks in any case
        assert sent[gradient] - sent[plain] == rows * 16


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", CASES)
def test_a_batch_without_rows_costs_nothing_on_any_rank(ranks, backend, world):
    for rank, share in zip(ranks(world), shares(101, world), strict=True):
        loss, logprobs = rank["no rows"][backend]
        assert loss["value"].item() == 0 and logprobs["value"].shape == (0,)
        for found in (loss, logprobs):
            assert found["hidden_grad"].shape == (0, 16) and found["weight_grad"].equal(torch.zeros(share, 16))
        assert loss["bias_grad"].equal(torch.zeros(share)) and loss["stats"].divergence.shape == (0,)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", CASES)
def test_a_group_of_one_process_is_a_call_without_a_group(ranks, backend, world):
    for rank in ranks(world):
        alone, without = rank["alone"][backend]
        for name in ("value", "hidden_grad", "weight_grad"):
            assert relative_l2(alone[name], without[name]) <= 1e-6 and without[name].norm() > 0
        for mine, other in zip(alone["stats"], without["stats"], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("backend", CASES)
def test_a_divergence_of_one_s_own_over_a_sharded_head(ranks, backend, world):
    got = together([rank["own term"][backend] for rank in ranks(world)])
    term = DivergenceTerm("squared, for the oracle", squared)
    true = of_the_oracle(Case(OWN_PAIR, dict(divergence=term)))
    assert got["value"].item() == pytest.approx(true["value"].item(), rel=1e-5)
    assert all(relative_l2(got[name], true[name]) <= 1e-5 for name in GRADIENTS[:2])


def test_every_divergence_is_among_the_cases():
    assert all(any(name.startswith(f"{d} ") or name.startswith(f"{d},") for name in all_cases()) for d in DIVERGENCES)
