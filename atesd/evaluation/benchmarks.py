"""The problems of an evaluation: the benchmarks of the papers by name, gsm_symbolic, a file, or any Hub dataset.

Separate from problems.py because a benchmark is evaluated whole and in its own order, needs no worked solutions, and
must not hold what the evaluated run was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atesd.config import load_config
from atesd.config.checks import ConfigError
from atesd.config.eval_config import EvalConfig
from atesd.data.problems import Problem, load_problems
from atesd.data.run_data import load_splits

__all__ = ["BENCHMARKS", "Benchmark", "load_benchmark", "seen_in_training"]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies on the Hub, and in which columns."""

    hub_name: str
    split: str
    problem_column: str
    answer_column: str
    num_problems: int


# As OPSD's evaluation reads them.
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("yentinglin/aime_2025", "train", "problem", "answer", 30),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer", 30),
}


def load_benchmark(config: EvalConfig) -> list[Problem]:
    """The problems `config` names: all of them in their own order, or `num_problems` drawn by `data_seed`.

    Raises:
        ConfigError: fewer problems than asked for, or than the benchmark has.
        ValueError: a missing file, column or dataset.
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
            f"answer: its numbers would not compare. Give a file of your own with --data FILE"
        )
    if config.num_problems is not None and len(found) < config.num_problems:
        raise ConfigError(
            f"num_problems is {config.num_problems}, but {config.dataset_name} has {len(found)}: lower it, or leave it "
            f"out"
        )
    return sorted(found[: config.num_problems], key=lambda problem: int(problem.id.rpartition("-")[2]))


def seen_in_training(problems: list[Problem], run_dir: Path) -> list[str] | None:
    """Ids of the problems that the run in `run_dir` trained on or was probed with; None where that cannot be told.

    Only a run on the same kind of data is looked at: one that trained on `gsm_symbolic`, or on a file that is there.
    """
    try:
        config = load_config(None, ["--resume", str(run_dir)])
        splits = load_splits(config)
    except (ValueError, ImportError):  # moved data, settings of another version
        return None
    known = {as_key(problem) for problem in [*splits.train, *splits.probe]}
    return [problem.id for problem in problems if as_key(problem) in known]


def as_key(problem: Problem) -> str:
    return " ".join(problem.problem.split()).casefold()
