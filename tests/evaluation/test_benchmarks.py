"""The benchmarks by name, read from local files in the columns and splits they have on the Hub."""

from __future__ import annotations

import json

import datasets
import pytest

from atesd.config import load_config
from atesd.config.eval_config import EvalConfig
from atesd.data.problems import load_problems
from atesd.errors import ConfigError
from atesd.evaluation.benchmarks import BENCHMARKS, load_benchmark, seen_in_training

# a row of each data set, with all its columns
ROWS = {
    "aime24": lambda i: {
        "id": 60 + i, "problem": f"Find the residue of {i}.", "solution": f"It is \\boxed{{{i + 1}}}.",
        "answer": f"{i:03d}", "url": "https://example.org", "year": "2024",
    },
    "aime25": lambda i: {
        "problem_idx": i, "problem": f"Find the residue of {i}.", "answer": str(i),
        "solution": f"So \\boxed{{{i + 1}}}.", "url": "https://example.org", "year": 2025,
    },
    "hmmt25": lambda i: {
        "problem_idx": i, "problem": f"Compute the sum over {i}.", "answer": f"\\frac{{{i}}}{{7}}",
        "problem_type": ["Algebra"],
    },
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets.load_dataset` with files in place of the Hub; `rows` changes how many a data set has."""
    real, rows = datasets.load_dataset, dict.fromkeys(BENCHMARKS, 30)
    by_hub_name = {benchmark.hub_name: name for name, benchmark in BENCHMARKS.items()}

    def load(path, *args, **kwargs):
        name = by_hub_name.get(path)
        if name is None:
            return real(path, *args, **kwargs)
        assert kwargs["split"] == BENCHMARKS[name].split
        file = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_list([ROWS[name](i) for i in range(rows[name])]).to_parquet(file)
        return real("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return rows


def config(name, **changes):
    return EvalConfig(model_name_or_path="m", dataset_name=str(name), **changes)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_is_read_whole_in_its_own_order_from_its_own_columns(hub, name):
    problems = load_benchmark(config(name))
    assert [p.problem for p in problems] == [ROWS[name](i)["problem"] for i in range(30)]
    assert [p.answer for p in problems] == [ROWS[name](i)["answer"] for i in range(30)]  # not the solution's box


def test_a_benchmark_that_has_lost_problems_is_refused(hub):
    hub["hmmt25"] = 29
    with pytest.raises(ConfigError, match=r"hmmt25 has 30 problems, but MathArena/hmmt_feb_2025 gave 29"):
        load_benchmark(config("hmmt25"))


def test_some_problems_of_a_benchmark_are_drawn_by_the_data_seed(hub):
    few = load_benchmark(config("aime24", num_problems=5))
    assert len(few) == 5 and few == load_benchmark(config("aime24", num_problems=5))
    assert few != load_benchmark(config("aime24", num_problems=5, data_seed=1))


def test_a_local_file_needs_a_problem_and_an_answer_only_and_columns_may_be_named(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "gold": i}) + "\n" for i in range(12)))
    problems = load_benchmark(config(file, problem_column="question", answer_column="gold"))
    assert [(p.problem, p.answer) for p in problems] == [(f"{i}?", str(i)) for i in range(12)]
    with pytest.raises(ValueError, match="no column for answer_column"):
        load_benchmark(config(file, problem_column="question"))
    with pytest.raises(ConfigError, match=r"num_problems is 13, but .* has 12"):
        load_benchmark(config(file, problem_column="question", answer_column="gold", num_problems=13))


def test_generated_problems_are_not_those_a_run_trains_on():
    evaluated = load_benchmark(config("gsm_symbolic", num_problems=40))
    assert len(evaluated) == 40 and evaluated[:10] == load_benchmark(config("gsm_symbolic", num_problems=10))
    trained = load_problems("gsm_symbolic", num_train=60, num_probe=4, num_eval=0, seed=0)
    assert not {p.problem for p in evaluated} & {p.problem for p in trained.train}


def test_problems_a_run_was_trained_on_are_told_apart_from_those_it_held_out(tmp_path):
    settings = ["--num_train_problems", "10", "--num_probe_problems", "3", "--num_eval_problems", "5"]
    run = load_config("gsm-symbolic", [*settings, "--output_dir", str(tmp_path)])
    run.save(tmp_path)
    splits = load_problems("gsm_symbolic", num_train=10, num_probe=3, num_eval=5, seed=0)
    mixed = [*splits.eval, splits.train[4], splits.probe[1]]
    assert seen_in_training(mixed, tmp_path) == [splits.train[4].id, splits.probe[1].id]
    assert seen_in_training(mixed, tmp_path / "elsewhere") is None
