"""Loads the problems of an evaluation: a benchmark of the papers by name, gsm_symbolic, a file or a Hub dataset.

Unlike training problems (data/problems.py), a benchmark is used in full and in its own order, and needs no worked
solutions. It must not contain problems on which the evaluated run was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atesd.config import load_config
from atesd.config.eval_config import EvalConfig
from atesd.data.problems import Problem, load_problems
from atesd.data.run_data import load_splits
from atesd.errors import ConfigError

__all__ = ["BENCHMARKS", "Benchmark", "load_benchmark", "seen_in_training"]


@dataclass(frozen=True)
class Benchmark:
    """Hub location, split, columns and size of a benchmark."""

    hub_name: str
    split: str
    problem_column: str
    answer_column: str
    num_problems: int


# The sources and columns of OPSD's evaluation.
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("yentinglin/aime_2025", "train", "problem", "answer", 30),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer", 30),
}


def load_benchmark(config: EvalConfig) -> list[Problem]:
    """Returns the problems that `config` names, in dataset order: all, or `num_problems` sampled with `data_seed`.

    Raises:
        ConfigError: the data has fewer problems than `num_problems`, or not as many as the benchmark should have.
        ValueError: a file, column or dataset is missing.
    """
    known = BENCHMARKS.get(config.dataset_name)
    columns = {
        "dataset_split": config.dataset_split or (known.split if known else "train"),
        "problem_column": config.problem_column or (known.problem_column if known else "problem"),
        "answer_column": config.answer_column or (known.answer_column if known else "answer"),
    }
    generated = config.dataset_name == "gsm_symbolic"
    found = load_problems(
        known.hub_name if known else config.dataset_name,
        num_train=config.num_problems if generated else None,
        num_probe=0,
        num_eval=0,
        seed=config.data_seed,
        require_solution=False,
        **columns,
    ).train
    if known and len(found) != known.num_problems:
        raise ConfigError(
            f"{config.dataset_name} has {known.num_problems} problems, but {known.hub_name} gave {len(found)} with an "
            f"answer: results would not be comparable. Use your own file with --data FILE"
        )
    if config.num_problems is not None and len(found) < config.num_problems:
        raise ConfigError(
            f"num_problems is {config.num_problems}, but {config.dataset_name} has {len(found)}: lower it, or leave it "
            f"out"
        )
    return sorted(found[: config.num_problems], key=lambda problem: int(problem.id.rpartition("-")[2]))


def seen_in_training(problems: list[Problem], run_dir: Path) -> list[str] | None:
    """Returns the ids of `problems` in the run's train or probe split; None if its data cannot be loaded.

    The run's data can be loaded if it is, for example, `gsm_symbolic` or a file that still exists.
    """
    try:
        config = load_config(None, ["--resume", str(run_dir)])
        splits = load_splits(config)
    except (ValueError, ImportError):  # the data moved, or the settings are of another version
        return None
    known = {problem.key for problem in [*splits.train, *splits.probe]}
    return [problem.id for problem in problems if problem.key in known]
