"""What a run asks of its data: no worked solution where nothing reads one."""

import json

import pytest

from atesd.config import load_config
from atesd.errors import DataError
from atesd.trainer import train

NO_TEACHER = {"objective": "grpo", "exposure_policy": "full", "num_generations": 2}
NOT_SHOWN = {"exposure_policy": "fixed", "fixed_alpha": 0.0}


@pytest.fixture
def without_solutions(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {n} and {n}?", "answer": str(2 * n)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("settings", [NO_TEACHER, NOT_SHOWN], ids=["grpo", "alpha 0"])
def test_a_run_that_reads_no_solution_needs_none(tiny_config, without_solutions, settings):
    config = tiny_config(dataset_name=without_solutions, num_probe_problems=0, max_steps=1, **settings)
    run_dir = train(config)
    assert json.loads((run_dir / "summary.json").read_text())["problems_used"] == 8


@pytest.mark.parametrize(
    "settings",
    [{**NOT_SHOWN, "num_probe_problems": 2}, {"exposure_policy": "fixed", "fixed_alpha": 0.5, "num_probe_problems": 0}],
    ids=["probe", "alpha 0.5"],
)
def test_a_run_that_reads_solutions_is_refused_without_them(tiny_config, without_solutions, settings):
    with pytest.raises(DataError, match="solution_column"):
        train(tiny_config(dataset_name=without_solutions, max_steps=1, **settings))


def test_a_recipe_takes_a_small_file_and_the_run_keeps_the_counts_it_found(tiny_config, without_solutions):
    config = tiny_config(dataset_name=without_solutions, max_steps=1, num_train_problems=400, num_eval_problems=8,
                         **{**NO_TEACHER, "num_probe_problems": 0})  # fmt: skip
    config.up_to = frozenset({"num_train_problems", "num_eval_problems"})
    with pytest.warns(UserWarning, match="num_train_problems is now 6"):
        run_dir = train(config)
    saved = load_config(None, ["--resume", str(run_dir)])
    assert (saved.num_train_problems, saved.num_eval_problems, saved.up_to) == (6, 2, frozenset())
