"""A recipe that ships may bring its own problems and prompts."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import yaml

from atesd.config import load_config
from atesd.data.segmentation import segment
from atesd.data.templates import PromptTemplates


def test_a_recipe_s_own_files_are_found_from_any_folder_also_by_a_file_that_extends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"extends": "quickstart", "max_steps": 3}))
    for config in (load_config("quickstart", []), load_config(str(mine), [])):
        for value in (config.dataset_name, config.prompt_templates):
            assert Path(value).is_absolute() and Path(value).is_file()
    other = tmp_path / "other.jsonl"
    other.touch()
    assert load_config("quickstart", ["--dataset_name", "other.jsonl"]).dataset_name == "other.jsonl"


def test_the_quickstart_s_references_compare_twice_and_end_in_the_largest_number():
    config = load_config("quickstart", [])
    rows = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    needed = config.num_train_problems + config.num_probe_problems + config.num_eval_problems
    assert len({frozenset(re.findall(r"\d+", row["problem"])) for row in rows}) == len(rows) >= needed
    for row in rows:
        numbers = set(map(int, re.findall(r"\d+", row["problem"])))
        assert len(numbers) == 3 and row["answer"] == str(max(numbers))
        *comparisons, last = segment(row["solution"])
        assert len(comparisons) == 2 and last == f"The answer is {row['answer']}."
        for comparison in comparisons:
            larger, smaller = map(int, re.findall(r"\d+", comparison))
            assert larger > smaller and {larger, smaller} < numbers


def test_the_quickstart_s_templates_say_nothing_of_its_own_problems():
    """`--dataset_name mine.jsonl` takes them over."""
    config = load_config("quickstart", [])
    templates = PromptTemplates.from_file(config.prompt_templates)
    said = set(re.findall(r"\w+", " ".join(filter(None, asdict(templates).values())).lower()))
    first = json.loads(Path(config.dataset_name).read_text().splitlines()[0])
    asked = set(re.findall(r"\w+", f"{first['problem']} {first['solution']}".lower()))
    assert templates.student == "{problem}" and said & asked <= {"the", "is", "answer"}
