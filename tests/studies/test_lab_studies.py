"""The lab's studies: each variant has the learning rate that the committed search found, and the same budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from atesd.studies.reading import load_spec
from atesd.studies.trial import MEASURED, read_result

STUDIES = ("lab-exposure", "lab-credit", "lab-controls")
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "studies"


@pytest.fixture(autouse=True)
def where_a_lab_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    for name in ("problems.jsonl", "tuning.jsonl", "templates.yaml"):
        (tmp_path / "lab" / name).touch()


def tried(variant: str) -> dict[float, float]:
    """Mean Average@k after training on the problems of the search, by learning rate."""
    found = {}
    for search in ("lab-tuning", "lab-tuning-grpo"):
        for name, settings in load_spec(search).variants.items():
            if name.rpartition("-")[0] == variant:
                rows = read_result(RESULTS / search / name / "seed-100" / MEASURED)["after"].values()
                found[settings["learning_rate"]] = sum(row["average"] for row in rows) / len(rows)
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_has_the_learning_rate_that_was_best_in_the_search(name):
    for variant, settings in load_spec(name).variants.items():
        found = tried(variant)
        assert len(found) == (6 if variant == "grpo" else 3), variant
        assert settings["learning_rate"] == max(found, key=found.__getitem__), (variant, found)


@pytest.mark.parametrize("name", STUDIES)
def test_the_search_had_other_problems_and_another_seed_and_the_same_budget(name):
    spec, search = load_spec(name), load_spec("lab-tuning")
    assert not set(spec.seeds) & set(search.seeds) and len(spec.seeds) >= 5
    assert spec.measure == search.measure and spec.measure.problems >= 200
    budgets = set()
    for study in (spec, search):
        for variant in study.variants:
            config = study.config(variant, 0, "unused", [])
            assert config.dataset_name == ("lab/problems.jsonl" if study is spec else "lab/tuning.jsonl")
            rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_generations
            budgets.add((rollouts, config.max_steps, config.max_completion_length))
    assert len(budgets) == 1
