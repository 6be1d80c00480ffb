"""The benchmark's own arithmetic: exponents, tables and targets from results, and the check that the pages and the
plots say what the committed results say. Nothing is measured here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from atesd.studies.trial import MEASURED, write_result
from atesd_kernels.backends.matmul import onednn_keeps_fp32
from bench import (
    attention_speed,
    entrants,
    loss_speed,
    machine,
    memory,
    plots,
    quickstart,
    scaling,
    shapes,
    step_vs_trl,
    table,
    targets,
    timing,
    topk_speed,
)
from bench.entrants import DENSE, OURS


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_pages_and_plots_are_what_the_committed_results_say():
    assert table.main(["--check"]) == 0


def test_a_processor_kept_from_its_instructions_is_its_own_kind(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for flags, kind in (("avx2 avx512f avx512_bf16 amx_bf16", "AVX2 by limit"), ("avx2", "AVX2")):
        monkeypatch.setattr(machine, "cpuinfo", lambda flags=flags: f"model name : X\nflags : {flags}")
        assert machine.processor_kind(machine.machine()) == kind


def test_the_check_fails_on_a_number_that_no_result_holds(tmp_path, capsys):
    readme = tmp_path / "README.md"
    text = table.PAGES[1].read_text(encoding="utf-8")
    first = next(m for m in table.MARKED.finditer(text) if "%" in m["body"])
    readme.write_text(text.replace(first["body"], first["body"].replace("%", "% ", 1)), encoding="utf-8")
    assert table.main(["--check", "--page", str(readme)]) == 1
    assert f"table {first['name']!r}" in capsys.readouterr().out
    readme.write_text(text.replace("<!-- end table -->", "", 1), encoding="utf-8")
    assert table.main(["--check", "--page", str(readme)]) == 1


def test_the_check_fails_on_a_plot_of_an_earlier_result(results, tmp_path, capsys):
    shutil.copytree(machine.ROOT / "bench" / "results", results)
    readme = tmp_path / "README.md"
    readme.write_text("no tables")
    assert table.main(["--check", "--page", str(readme)]) == 0
    result = machine.load("memory")
    result["rows"][0]["extra_bytes"] *= 2
    (results / "memory.json").write_text(json.dumps(result))
    assert table.main(["--check", "--page", str(readme)]) == 1
    assert "memory.png was not drawn from memory.json" in capsys.readouterr().out
    assert table.main(["--page", str(readme)]) == 0 and table.main(["--check", "--page", str(readme)]) == 0


def test_a_study_of_which_some_runs_have_results_has_a_table_of_them(results):
    """Eight problems, all wrong before. Seed 0 learns them all; seed 1 learns one, which resamples may lack."""
    assert table.render("quickstart") == "(not measured yet: no quickstart in bench/results)"
    right = {("learned", 0): 8, ("learned", 1): 1, ("full", 1): 8}
    for (variant, seed), n in right.items():
        folder = results / "studies" / "quickstart" / variant / f"seed-{seed}"
        folder.mkdir(parents=True)
        after, before = (
            {f"p{i}": {"average": float(i < count), "response_length": length, "no_answer": 0.5} for i in range(8)}
            for count, length in ((n, 8.0), (0, 20.0))
        )
        content = {"variant": variant, "seed": seed, "digest": "d", "before": before, "after": after}
        write_result(folder / MEASURED, content)
    rows = [line for line in table.render("quickstart").splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| learned | 0.00 → 0.56 | +0.56 [-5.00, +6.12] | 1 of 2 |  | 20.0 → 8.0 | 0.50 → 0.50 |",
        "| full | 0.00 → 1.00 | +1.00 | 1 of 1 | +0.88 | 20.0 → 8.0 | 0.50 → 0.50 |",
    ]
    shutil.rmtree(results / "studies" / "quickstart" / "learned")
    assert "| full | 0.00 → 1.00 | +1.00 | 1 of 1 |  |" in table.render("quickstart")


def test_the_front_page_s_picture_begins_with_the_accuracies_where_a_run_has_them(tmp_path):
    rows = [
        {"step": step, "alpha": 0.5, "beta_a": 2.0, "beta_b": 2.0, "mismatch": 0.1, "probe_nll": 1.5}
        for step in range(1, 4)
    ]
    measured = {"eval_average": 0.25, "eval_average_low": 0.125, "eval_average_high": 0.5}
    start = {"step": 0, **measured}
    for name, content in (("without", rows), ("with", [start, *rows[:2], {**rows[2], **measured}])):
        quickstart.plot({"rows": content}, tmp_path / f"{name}.png", "a digest")
        assert plots.stamp_of(tmp_path / f"{name}.png") == "a digest"
    heights = {name: Image.open(tmp_path / f"{name}.png").height for name in ("without", "with")}
    assert quickstart.accuracy_plot([start, *rows]) is None, "a run that was not measured at its end"
    assert heights["with"] == heights["without"] + 216 + quickstart.GAP, "a strip of 1.5 inches at 144 dots"


def test_the_top_k_losses_are_measured_beside_their_peers(results, monkeypatch):
    """Each against float64 with its own tail: near where the dense logits are fp32."""
    monkeypatch.setattr(topk_speed, "inputs", shapes.synthetic)
    result = topk_speed.main(
        tokens=24, k=5, rounds=1, dtypes=("fp32",), shape=shapes.Shape("tiny", 16, 300)
    )  # fmt: skip
    assert {r["tail"] for r in result["rows"]} == {"bucket", "ignore"} and len(result["rows"]) >= 3
    assert all(row["error"] < 1e-3 for row in result["rows"])
    assert topk_speed.table(machine.load("topk_speed")).count("| atesd_kernels, tail") == 2


def test_attention_is_measured_beside_torch_s_kernel(results):
    result = attention_speed.main(lengths=(8, 20), rounds=1)
    entrants = {
        phase: {r["entrant"] for r in result["rows"] if r["phase"] == phase} for phase in attention_speed.PHASES
    }
    torchs, ours = {"torch, fused", "torch, fused, in a step"}, {attention_speed.OURS} if onednn_keeps_fp32() else set()
    assert all(found == torchs | ours for found in entrants.values())
    assert attention_speed.table(machine.load("attention_speed")).count(attention_speed.DECODED) == 2


def test_an_exponent_is_the_power_of_a_power_law():
    x = [64, 128, 256, 1024]
    assert scaling.exponent(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)
    assert scaling.exponent(x, [7.0] * 4) == pytest.approx(0, abs=1e-12)


def test_scaling_of_the_loss_alone_is_measured_fitted_and_drawn(results, monkeypatch):
    axes = {"tokens": ((16, 32), {"vocab": 300}), "vocab": ((256, 512), {"tokens": 16})}
    monkeypatch.setattr(scaling, "HERE", (shapes.Shape("tiny", 8, 300),))
    scaling.run(axes, "fp32", rounds=1)
    result = machine.load("scaling-tiny")
    assert [(r["axis"], r["value"]) for r in result["rows"][::2]] == [(a, v) for a in axes for v in axes[a][0]]
    assert {row["entrant"] for row in result["rows"]} == {OURS, DENSE}
    assert "| V, vocabulary (tokens 16) | atesd_kernels | 256 - 512 |" in scaling.table(result)
    scaling.plot(result, results / "scaling.png", "a digest")
    assert plots.stamp_of(results / "scaling.png") == "a digest"


def test_a_loss_measured_small_names_everyone_and_survives_an_interruption(results, monkeypatch):
    tiny = shapes.Shape("tiny", 8, 300)
    monkeypatch.setattr(timing, "interleave", interrupted_in_the_second_phase(timing.interleave))
    with pytest.raises(KeyboardInterrupt):
        loss_speed.measure("forward_kl", "fp32", 32, rounds=2, compiled=False, shape=tiny)
    saved = machine.load(loss_speed.result_name("forward_kl", "fp32", 32, tiny))
    named = {row["entrant"] for row in saved["rows"]} | set(saved["missing"]) | set(saved["failed"])
    assert named >= set(entrants.names("forward_kl"))
    assert saved["missing"]["flash-linear-attention"] == entrants.NEEDS_GPU or torch.cuda.is_available()
    ours = next(row for row in saved["rows"] if row["entrant"] == OURS)
    assert len(ours["rounds"]) == 2 and ours["error"]["gradient"] < 1e-5
    assert "| flash-linear-attention | needs a GPU |" in loss_speed.table(saved)


def interrupted_in_the_second_phase(interleave):
    calls = []

    def run(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleave(*args)

    return run


def test_rounds_end_with_the_budget_but_there_is_one():
    seen = []
    seconds = timing.interleave({"a": lambda: None, "b": lambda: None}, 5, budget=-1.0, after_round=seen.append)
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 1, "b": 1} and len(seen) == 1


def test_an_entrant_has_other_neighbours_in_other_rounds():
    calls = []
    timing.interleave({name: lambda name=name: calls.append(name) for name in "abcdef"}, 6)
    rounds = [calls[i : i + 6] for i in range(0, 36, 6)]
    assert all(sorted(one) == list("abcdef") for one in rounds)
    before_a = {one[one.index("a") - 1] for one in rounds if one[0] != "a"}
    assert len(before_a) > 1


def test_targets_say_what_is_reached_what_is_not_and_what_nobody_measured(results):
    def loss(name, dtype, **seconds):
        rows = [{"entrant": n, "phase": loss_speed.PHASES[0], "median": t} for n, t in seconds.items()]
        machine.save(f"losses/{name}-{dtype}-64", {"loss": name, "dtype": dtype, "tokens": 64, "rows": rows})

    loss("jsd", "fp32", **{OURS: 1.0, DENSE: 2.5, timing.OWN_GEMMS: 0.75})
    loss("jsd", "bf16", **{OURS: 1.0, DENSE: 0.9})
    loss("logprobs", "fp32", **{OURS: 1.0, DENSE: 3.0, timing.OWN_GEMMS: 0.9})
    kind = machine.processor_kind(machine.machine())
    sizes = [(OURS, 1024, 90), (DENSE, 1024, 200), (OURS, 4096, 100), (DENSE, 4096, 4000)]
    rows = [{"entrant": e, "dtype": "fp32", "tokens": n, "extra_bytes": b} for e, n, b in sizes]
    machine.save("memory", {"rows": rows})
    text = targets.table()
    assert f"fp32, {kind} | over 1 | 2.5 | dense torch (TRL), jsd, N = 64 | yes |" in text
    assert f"bf16, {kind} | over 1 | 0.9 | dense torch (TRL), jsd, N = 64 | **no** |" in text
    assert (
        f"divergences, time over that of our products, fp32, {kind} | at most 1.25 | 1.33 | jsd, N = 64 | **no** |"
        in text
    )
    assert (
        f"log-probs, time over that of our products, fp32, {kind} | at most 1.15 | 1.11 | logprobs, N = 64 | yes |"
        in text
    )
    assert "| at most 0.1 | 0.025 | fp32, N = 4,096 | yes |" in text
    assert text.count("not measured") == 11


def test_a_step_is_told_in_one_setting_of_each_side_and_against_trl_s_best_rows():
    def row(name, seconds, rollout, peak):
        return {"name": name, "seconds": seconds, "cpu_seconds": 1, "peak": peak, "phases": {"rollout": rollout}}

    other = row(f"{step_vs_trl.SIDES['distillation']}, micro-batches of 8", 3.0, 1.0, 1e9)
    rows = [row("atesd, micro-batches of 2", 10.0, 4.0, 2e9), row("TRL SDFTTrainer, a", 20.0, 12.0, 5e9)]
    rows += [row("TRL SDFTTrainer, b", 25.0, 13.0, 4e9), other]
    result = {"tokens": 100, "rows": rows, "shape": [8]}
    limits = {"seconds": 0.65, "peak": 0.5}
    assert step_vs_trl.one_setting(result, limits) is None
    natural = "TRL SDFTTrainer, micro-batches of 8"
    wide = {**result, "rows": [*rows, row("atesd, micro-batches of 1", 15.0, 4.0, 1e9), row(natural, 24.0, 0.0, 5e9)]}
    two, one = "atesd, micro-batches of 2", "atesd, micro-batches of 1"
    assert step_vs_trl.one_setting(wide, limits) == (two, natural, {"seconds": 10 / 24, "peak": 0.4})
    wide["rows"][0] = row(two, 10.0, 4.0, 3e9)  # the fastest, but now above the limit of memory
    assert step_vs_trl.one_setting(wide, limits) == (one, natural, {"seconds": 15 / 24, "peak": 0.2})
    assert step_vs_trl.ratios(result) == {"seconds": 0.5, "without_rollouts": 0.75, "peak": 0.5}
    assert "| atesd, micro-batches of 2 | 10.0 | 6.0 |" in step_vs_trl.table(result)


def test_a_row_of_several_rounds_is_that_of_the_median_process():
    rounds = [{"name": "a", "seconds": s, "peak": p, "phases": {"rollout": s / 2}} for s, p in ((3, 1), (9, 4), (2, 2))]
    row = step_vs_trl.of_rounds(rounds)
    assert row == {**rounds[0], "peak": 4, "rounds": [3, 9, 2]}
    assert step_vs_trl.of_rounds(rounds[:2])["seconds"] == 3
    table = step_vs_trl.table({"tokens": 6, "rows": [{**row, "cpu_seconds": 1}]})
    assert "| a | 3.0 (2.0 - 9.0) | 1.5 |" in table


@pytest.mark.parametrize(
    ("name", "module", "loss"),
    [
        ("Liger fused JSD", "liger_kernel", "forward_kl"),
        ("Liger fused JSD", "liger_kernel", "jsd"),
        ("flash-linear-attention", "fla", "forward_kl"),
        ("ORDA (torch path)", "orda_kernel", "jsd"),
        (entrants.TRL_CHUNKED, "trl", "jsd"),
    ],
)
def test_a_peer_computes_the_loss_it_is_timed_for(name, module, loss):
    """Those for a GPU in Triton's interpreter."""
    pytest.importorskip(module)
    x = shapes.synthetic(shapes.Shape("tiny", 64, 512), 32)
    exact_value, exact_grad = entrants.oracle(loss, x)
    value, grad = entrants.value_and_grad(entrants.entrant(name, loss), x)
    assert value.item() == pytest.approx(exact_value, rel=1e-5)
    assert entrants.relative_error(grad, exact_grad) < 1e-4


def test_synthetic_inputs_have_the_mean_kl_they_are_made_for():
    x = shapes.synthetic(shapes.Shape("tiny", 32, 1000), 256)
    value, _ = entrants.oracle("forward_kl", x)
    assert value == pytest.approx(shapes.MEAN_KL, rel=0.1)


def test_memory_that_would_take_too_long_or_too_much_is_named_not_run(results, monkeypatch):
    clock = iter(range(0, 10**6, 100))  # each figure takes 100 s, of which a process's start is the least
    monkeypatch.setattr(memory, "START_UP", 20)
    monkeypatch.setattr(memory.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(memory, "available", lambda: 10 * 2**30)
    linear = {"extra_bytes": 2**20}
    monkeypatch.setattr(memory, "measure", lambda name, dtype, n, shape: {"extra_bytes": n * linear["extra_bytes"]})
    monkeypatch.setattr(memory, "missing", lambda name: None if name in (OURS, DENSE) else "gone")

    def cells(tokens):
        rows = memory.run(tokens, tokens, compiled=False, shape=shapes.Shape("tiny", 8, 300), dtypes=["fp32"])["rows"]
        return [memory.cell(row) for row in rows if row["entrant"] == DENSE]

    assert cells((512, 1024, 16_384)) == ["512", "1,024", "not run: would take about 16 GiB"]
    linear["extra_bytes"] = 2**10
    assert cells((1024, 2048, 65_536))[2] == "not run: would take about 43 minutes"


def test_memory_of_a_call_is_its_peak_and_not_what_it_leaves():
    def call():
        return torch.ones(24 * memory.MIB // 4).sum().item()

    call()
    assert memory.extra_peak(call)[0] / memory.MIB == pytest.approx(24, abs=6)
