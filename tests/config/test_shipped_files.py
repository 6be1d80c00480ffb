"""A recipe that ships may bring its own problems and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from atesd.config import load_config
from atesd.data.segmentation import segment
from atesd.data.templates import PromptTemplates


def test_a_recipe_s_own_files_are_found_from_any_folder_also_by_a_file_that_extends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"extends": "sums", "max_steps": 3}))
    for config in (load_config("sums", []), load_config(str(mine), [])):
        for value in (config.dataset_name, config.prompt_templates):
            assert Path(value).is_absolute() and Path(value).is_file()
    other = tmp_path / "other.jsonl"
    other.touch()
    assert load_config("sums", ["--dataset_name", "other.jsonl"]).dataset_name == "other.jsonl"


def test_the_sums_have_references_of_two_lines_that_end_in_their_answers():
    config = load_config("sums", [])
    rows = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    needed = config.num_train_problems + config.num_probe_problems + config.num_eval_problems
    assert len({row["problem"] for row in rows}) == len(rows) >= needed
    for row in rows:
        first, second = map(int, row["problem"].removeprefix("What is ").removesuffix("?").split(" + "))
        assert row["answer"] == str(first + second)
        assert len(segment(row["solution"])) == 2
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}.")
    PromptTemplates.from_file(config.prompt_templates)
