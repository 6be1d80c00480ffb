"""A start that is refused leaves no folder behind: not the run's, not those above it, whatever refuses it and when.

And a package that is absent is named at the start, with pip's command, not where it is first imported.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import Accelerator

from atesd import cli
from atesd.config.eval_config import EvalConfig
from atesd.errors import ConfigError
from atesd.evaluation import command
from atesd.evaluation.command import evaluate
from atesd.models.loading import ModelLoadError
from atesd.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def absent(monkeypatch):
    """`absent("matplotlib", ...)`: as if these were not installed."""

    def remove(*modules):
        def missing(name, package=None):
            return None if name.partition(".")[0] in modules else find_spec(name, package)

        monkeypatch.setattr("atesd.packages.find_spec", missing)
        monkeypatch.setattr("atesd.config.checks.find_spec", missing)
        for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


@pytest.fixture
def of(tiny_model_path, sums, tmp_path):
    """The arguments of a command that would work."""
    sums_here, model = str(sums), str(tiny_model_path)
    problems = ["--dataset_name", sums_here, "--num_probe_problems", "2", "--max_steps", "1", "--lora_r", "2"]
    problems += ["--max_completion_length", "8", "--exposure_policy", "full", "--num_train_problems", "8"]
    return {
        "train": ["train", "--model_name_or_path", model, *problems, "--output_dir", "a/b/out"],
        "sweep": ["sweep", "--model_name_or_path", model, *problems[:-4], "--num_train_problems", "8",
                  "--alphas", "0.5", "--seeds", "0", "--output_dir", "a/b/out"],
        "eval": ["eval", "--model", model, "--data", sums_here, "--num_problems", "2", "--k", "1",
                 "--max_new_tokens", "8", "--output_dir", "a/b/out"],
    }  # fmt: skip


def broken_model(model, tmp_path):
    """A model whose weights do not load: found only when they are read."""
    folder = Path(shutil.copytree(model, tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes(b"no weights" * 9)
    return str(folder)


def code_of(argv):
    """The exit code; 1 also for an error that shows a traceback."""
    try:
        return cli.main(argv)
    except Exception:
        return 1


@pytest.mark.parametrize("name", ["train", "sweep", "eval"])
@pytest.mark.parametrize("fault", ["a model that is not there", "weights that do not load", "no such file"])
def test_a_refused_start_leaves_no_folder(of, here, name, fault, tiny_model_path, tmp_path, sums, capsys):
    argv = of[name]
    model, data = str(tiny_model_path), str(sums)
    replaced = {
        "a model that is not there": {model: str(tmp_path / "nowhere")},
        "weights that do not load": {model: broken_model(model, tmp_path)},
        "no such file": {data: str(tmp_path / "nowhere.jsonl")},
    }[fault]
    assert code_of([replaced.get(word, word) for word in argv]) in (1, 2)
    assert list(here.iterdir()) == []


def test_an_engine_that_refuses_leaves_no_evaluation_and_one_with_samples_stays(of, here, monkeypatch):
    def refuses(*_):
        raise ModelLoadError("as a test")

    monkeypatch.setattr(command, "make_engine", refuses)
    assert cli.main(of["eval"]) == 1
    assert list(here.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli.main(of["eval"]) == 0
    monkeypatch.setattr(command, "make_engine", refuses)
    (here / "a/b/out/results.json").unlink()
    with (here / "a/b/out/samples.jsonl").open("r+") as file:
        first = file.readline()
        file.truncate(len(first.encode()))
    assert cli.main(of["eval"]) == 1
    assert (here / "a/b/out/samples.jsonl").read_text() == first and (here / "a/b/out/eval_config.json").is_file()


@pytest.mark.parametrize(("name", "flags", "module", "pip"), [
    ("eval", [], "math_verify", "math-verify"),
    ("eval", [], "matplotlib", "matplotlib"),
    ("train", [], "matplotlib", "matplotlib"),
    ("sweep", [], "matplotlib", "matplotlib"),
    ("train", ["--report_to", "wandb"], "wandb", "wandb"),
    ("train", ["--teacher", "model", "--teacher_model_name_or_path", "a/b", "--teacher_weights", "4bit"],
     "bitsandbytes", "bitsandbytes"),
    ("train", ["--report_to", "comet_ml"], "comet_ml", "comet-ml"),
    ("train", ["--objective", "grpo", "--num_generations", "2", "--entry_clip", "0"], "math_verify", "math-verify"),
])  # fmt: skip
def test_a_package_that_is_absent_is_named_before_anything_is_written(
    of, here, absent, capsys, name, flags, module, pip
):
    absent(module)
    assert cli.main([*of[name], *flags]) == 1
    said = capsys.readouterr().err
    assert f"pip install {pip}" in said and "Traceback" not in said
    assert list(here.iterdir()) == []


def test_either_of_tensorboards_packages_will_do(tiny_config, absent, monkeypatch):
    absent("tensorboard")
    monkeypatch.setattr("atesd.config.checks.find_spec", lambda name: name if name == "tensorboardX" else None)
    tiny_config(report_to="tensorboard").validate()


def test_a_tracker_that_does_not_start_is_named_and_leaves_no_folder(tiny_config, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setattr(Accelerator, "init_trackers", refuses)
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"report_to is 'none', which does not start .*api_key.*: log in"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_folders_above_that_hold_something_else_stay(of, here, tmp_path, tiny_model_path):
    (here / "a").mkdir()
    (here / "a" / "mine").write_text("mine")
    broken = broken_model(tiny_model_path, tmp_path)
    assert code_of([broken if word == str(tiny_model_path) else word for word in of["train"]]) == 1
    assert [path.name for path in (here / "a").iterdir()] == ["mine"]


def test_the_default_length_is_what_the_context_leaves_and_a_line_says_so(
    tiny_model_path, sums, tmp_path, capsys, monkeypatch
):
    def config(name, **changes):
        return EvalConfig(
            model_name_or_path=str(tiny_model_path), dataset_name=str(sums), num_problems=1, num_generations=1,
            output_dir=str(tmp_path / name), **changes,
        )  # fmt: skip

    lengths = []

    def generate(config, *_):
        lengths.append(config.max_completion_length)
        raise ModelLoadError("seen enough")

    monkeypatch.setattr(command, "generate_samples", generate)
    for name, changes in {"a": {}, "b": {"max_completion_length": 30}}.items():
        with pytest.raises(ModelLoadError, match="seen enough"):
            evaluate(config(name, **changes))
    said = re.search(r"max_completion_length: (\d+) tokens instead of OPSD's 38912", capsys.readouterr().out)
    context = json.loads((tiny_model_path / "config.json").read_text())["max_position_embeddings"]
    assert lengths == [int(said[1]), 30] and 0 < context - lengths[0] < 400
    with monkeypatch.context() as patched:  # a context that is long enough is not spoken of
        patched.setattr(command, "LONGEST", 20)
        with pytest.raises(ModelLoadError, match="seen enough"):
            evaluate(config("c"))
    assert lengths[-1] == 20 and "instead of" not in capsys.readouterr().out
