"""What `atesd train` and `atesd eval` print without arguments, and that --help says each thing once."""

from __future__ import annotations

import re
import shlex

import pytest

from atesd import cli
from atesd.config import config_parser, recipes
from atesd.config.eval_config import eval_parser
from atesd.config.fields import Settings

PARSERS = {"train": config_parser, "eval": eval_parser}


@pytest.mark.parametrize("name", PARSERS)
def test_a_command_alone_prints_one_page_whose_flags_and_examples_exist(name, capsys):
    assert cli.main([name]) == 2
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    known = {option for action in PARSERS[name]()._actions for option in action.option_strings} | {"--help"}
    flags = set(re.findall(r"--[\w-]+", page)) - ({"--compare"} if name == "eval" else set())
    assert len(flags) >= 12 and flags <= known, flags - known
    examples = [shlex.split(re.split(r"  +", line.strip())[0]) for line in lines if line.startswith(f"  atesd {name} ")]
    assert len(examples) == 3 and all(example[:2] == ["atesd", name] for example in examples)
    assert "--help has all" in lines[-1]


def test_the_page_of_train_names_the_recipes(capsys):
    cli.main(["train"])
    page = capsys.readouterr().out
    assert all(recipe in page for recipe in recipes())


@pytest.mark.parametrize("name", PARSERS)
def test_a_negative_flag_does_not_repeat_the_help_of_the_positive_one(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    negative = {a.dest: a for a in PARSERS[name]()._actions if any(o.startswith("--no_") for o in a.option_strings)}
    assert "box_only" in negative
    for dest, action in negative.items():
        assert action.help == f"Turn {dest} off."
        positive = next(a for a in PARSERS[name]()._actions if f"--{dest}" in a.option_strings)
        assert text.count(" ".join(positive.help.split()[:8])) == 1
    assert not re.search(r"Turn \w+ off\. \(default", text)


def test_a_negative_flag_still_turns_its_setting_off():
    groups = config_parser().parse_args_into_dataclasses(["--no_use_peft"])
    assert [group.use_peft for group in groups if hasattr(group, "use_peft")] == [False]
    assert Settings().use_peft is True
