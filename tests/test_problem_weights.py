"""A column of weights: how it is read, what it weighs in a run, and what it leaves alone."""

from __future__ import annotations

import json
import math

import pytest

from atesd.config import load_config
from atesd.data.problems import load_problems, weights_of
from atesd.errors import ConfigError, DataError
from atesd.planning.dry_run import dry_run
from atesd.run import Run
from atesd.trainer import Trainer, train

WITHOUT_POLICY = {"exposure_policy": "full", "num_probe_problems": 0, "grounding": "none"}
ALONE = ("loss", "sft_loss", "grad_norm", "clip_fraction")  # all that weights change in a first step


@pytest.fixture
def weighted(sums, tmp_path):
    """`weighted(function)`: the worked sums with a column `w`, the function of a row's number."""

    def make(weight, name="weighted", kind="jsonl"):
        rows = [json.loads(line) for line in sums.read_text(encoding="utf-8").splitlines()]
        path = tmp_path / f"{name}.{kind}"
        lines = [json.dumps({**row, "w": weight(number)}) + "\n" for number, row in enumerate(rows)]
        path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    return make


def first_step(config):
    run = Run.build(config)
    metrics, _ = Trainer(run).train_step(0)
    run.close()
    return {name: value for name, value in metrics.items() if "second" not in name and "memory" not in name}


def load(path, **settings):
    return load_problems(path, num_train=None, num_probe=0, num_eval=0, seed=0, **settings).train


def test_weights_are_read_by_problem_from_any_kind_of_cell(tmp_path):
    values = [2, 0.5, 0, "1.5", {"inner": 3}]
    path = tmp_path / "a.json"
    rows = [
        {"problem": f"q{n}", "solution": f"It is \\boxed{{{n}}}.", "w": value} for n, value in enumerate(values[:4])
    ]
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    found = {p.problem: p.weight for p in load(str(path), weight_column="w")}
    assert found == {"q0": 2.0, "q1": 0.5, "q2": 0.0, "q3": 1.5}
    assert {p.weight for p in load(str(path))} == {1.0} and weights_of(load(str(path))) is None
    path.write_text(json.dumps({"data": [{**rows[0], "w": values[4]}]}), encoding="utf-8")
    assert load(str(path), weight_column="w.inner")[0].weight == 3.0
    (tmp_path / "a.csv").write_text("problem,solution,w\nq0,\\boxed{7},0.5\n", encoding="utf-8")
    assert load(str(tmp_path / "a.csv"), weight_column="w")[0].weight == 0.5


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, "heavy", True, None, [1, 2], ""])
def test_a_weight_that_is_no_number_of_at_least_0_is_refused_by_row(tmp_path, bad):
    rows = [{"problem": "q", "solution": "\\boxed{7}", "w": bad}]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    with pytest.raises(DataError, match="a-0: weight_column='w' must hold a finite number of at least 0, not"):
        load(str(tmp_path / "a.json"), weight_column="w")


def test_an_absent_column_is_named_with_those_there_are(sums):
    with pytest.raises(DataError, match=r"weight_column='v' must hold.*'answer', 'problem', 'solution'"):
        load(str(sums), weight_column="v")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weight_column": " "}, "weight_column is ' '"),
        (
            {"weight_column": "w", "dataset_name": "gsm_symbolic", "num_train_problems": 8},
            "weight_column .w. would be ign",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(tiny_config, settings, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**settings).validate()


def test_a_run_in_which_nothing_counts_is_refused(tiny_config, weighted):
    with pytest.raises(DataError, match="weight_column='w' gives all 14 training problems the weight 0"):
        train(tiny_config(dataset_name=weighted(lambda n: 0), weight_column="w"))


OBJECTIVES = [
    {},
    {"loss_aggregation": "sequence"},
    {"objective": "sft"},
    {"objective": "distill+sft", "sft_weight": 0.5},
    {"objective": "policy_gradient"},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=["distill", "sequence", "sft", "distill+sft", "policy_gradient"])
def test_a_weight_for_all_is_a_factor_of_the_loss_and_of_nothing_else(tiny_config, weighted, tmp_path, settings):
    settings = WITHOUT_POLICY | {"progress_signal": "distill_loss"} | settings
    path, ones = weighted(lambda n: 3.0, "threes"), weighted(lambda n: 1, "ones")
    found = [
        first_step(tiny_config(output_dir=str(tmp_path / str(n)), dataset_name=name, weight_column=column, **settings))
        for n, (name, column) in enumerate(((path, None), (path, "w"), (ones, "w")))
    ]
    plain, threefold, same = found
    assert same == plain
    for name in set(plain) - set(ALONE):
        assert threefold[name] == plain[name], name
    for name in {"loss", "sft_loss"} & set(plain):
        assert threefold[name] == pytest.approx(3 * plain[name], rel=1e-5, abs=1e-7)
    assert threefold["grad_norm"] == pytest.approx(3 * plain["grad_norm"], rel=1e-4)


def test_a_problem_of_weight_0_trains_nothing_and_keeps_its_place_in_the_mean(tiny_config, weighted, tmp_path):
    """A step of one problem that weighs nothing has loss and gradient 0, and counts its tokens."""
    path = weighted(lambda n: float(n % 2))
    settings = {"dataset_name": path, "weight_column": "w", "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1, "progress_signal": "distill_loss", **WITHOUT_POLICY}  # fmt: skip
    run = Run.build(tiny_config(**settings))
    trainer, seen = Trainer(run), {}
    for step in range(6):
        drawn = run.data.problems.train[run.rollout.sampler.peek(1)[0]]
        metrics, sample = trainer.train_step(step)
        assert sample["problem_id"] == drawn.id and metrics["num_tokens"] > 0
        seen.setdefault(drawn.weight, []).append(metrics["grad_norm"])
    run.close()
    assert set(seen) == {0.0, 1.0}
    assert max(seen[0.0]) == 0 < min(seen[1.0])


def test_a_run_with_weights_goes_on_with_them(tiny_config, weighted, tmp_path):
    settings = {"dataset_name": weighted(lambda n: 0.25 * n), "weight_column": "w"}
    whole = train(tiny_config(max_steps=3, output_dir=str(tmp_path / "whole"), **settings))
    part = train(tiny_config(max_steps=2, output_dir=str(tmp_path / "part"), **settings))
    train(load_config(None, ["--resume", str(part), "--max_steps", "3"]))
    losses = [
        [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for run_dir in (part, whole)
    ]
    assert losses[0] == losses[1]
    weighted(lambda n: 0.5 * n)  # the same file, with other weights
    with pytest.raises(ConfigError, match="the training problems"):
        train(load_config(None, ["--resume", str(part), "--max_steps", "4"]))
    with pytest.raises(ConfigError, match="weight_column is 'v'"):
        load_config(None, ["--resume", str(part), "--weight_column", "v"])


def test_the_dry_run_says_the_column_and_its_range(tiny_config, weighted):
    config = tiny_config(dataset_name=weighted(lambda n: n % 3), weight_column="w", num_probe_problems=0,
                         progress_signal="distill_loss")  # fmt: skip
    assert dry_run(config).data["run"]["weights"] == "column w: 0 to 2, mean 0.9375"
    assert "weights" not in dry_run(tiny_config()).data["run"]
