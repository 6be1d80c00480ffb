"""The command line: its answers, exit codes and speed, without training anything."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import atesd
from atesd import cli
from atesd.config import load_config
from atesd.errors import AtesdError
from atesd.evaluation.files import EvalError
from atesd.models.loading import ModelLoadError
from atesd.parallel.sharding import ShardingError
from atesd.reports.metrics import RunLog
from atesd.reports.printout import Printout
from atesd.reports.report import ReportError
from atesd.rollout import RolloutError
from atesd.stopping import Stopped, go_on_command
from atesd.storage.checkpoint import save_checkpoint
from atesd.trainer import NonFiniteLoss


def run(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "atesd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_names_the_commands_and_imports_nothing_heavy():
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "eval", "report", "doctor"))
    assert not any(f" {heavy}\n" in result.stderr for heavy in ("torch", "transformers", "matplotlib", "numpy"))


def test_atesd_alone_names_the_commands_with_a_line_each(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +\w", told, re.MULTILINE) for name, _ in cli.COMMANDS)


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evaluate", "eval"), ("Report", "report")])
def test_a_mistyped_command_is_refused_with_the_one_that_is_meant(typed, meant, capsys):
    assert cli.main([typed, "--max_steps", "3"]) == 2
    assert f"there is no command '{typed}' (did you mean {meant}?)" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    told = capsys.readouterr().err
    assert "did you mean" not in told and "doctor" in told


def test_a_mistyped_flag_is_refused_before_torch_loads():
    result = run("train", "quickstart", "--max_step", "2")
    assert result.returncode == 2
    assert "did you mean max_steps" in result.stderr
    assert " torch\n" not in result.stderr
    assert "Traceback" not in result.stderr


def test_train_hands_the_configuration_to_the_trainer_and_names_the_report(monkeypatch, capsys, tmp_path):
    seen = []

    class Trainer:
        @staticmethod
        def train(config):
            seen.append(config)
            return Path(config.output_dir)

    monkeypatch.setitem(sys.modules, "atesd.trainer", Trainer)
    monkeypatch.setattr("atesd.trainer", Trainer, raising=False)
    assert cli.main(["train", "quickstart", "--max_steps", "3", "--output_dir", str(tmp_path / "run")]) == 0
    assert seen[0].max_steps == 3
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("at", ["a checkpoint", "the first step", "SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_names_the_command_that_goes_on(monkeypatch, capsys, tmp_path, at):
    number = {"SIGINT": 2, "SIGTERM": 15}.get(at)

    class Trainer:
        @staticmethod
        def train(config):
            config.save(config.output_dir)
            if at == "a checkpoint":
                save_checkpoint(config.output_dir, 1, {}, None, keep=1)
            raise Stopped(f"go on with {go_on_command(config.output_dir)}", number) if number else KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "atesd.trainer", Trainer)
    monkeypatch.setattr("atesd.trainer", Trainer, raising=False)
    run_dir = tmp_path / "my run"
    assert cli.main(["train", "quickstart", "--output_dir", str(run_dir)]) == (143 if at == "SIGTERM" else 130)
    message, _, command = capsys.readouterr().err.partition(" atesd train ")
    assert message.startswith("atesd: stopped") and ("SIGTERM" in message) == (at == "SIGTERM")
    assert ("nothing is saved yet. Start over" in message) == (at == "the first step")
    assert shlex.split(command) == ["--resume", str(run_dir)]
    assert load_config(None, shlex.split(command)).resume == str(run_dir)


def test_a_run_that_is_stopped_before_it_has_a_folder_names_no_command(monkeypatch, capsys, tmp_path):
    class Trainer:
        @staticmethod
        def train(config):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "atesd.trainer", Trainer)
    monkeypatch.setattr("atesd.trainer", Trainer, raising=False)
    assert cli.main(["train", "quickstart", "--output_dir", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "atesd: stopped\n"


def test_train_help_explains_the_fields_and_train_alone_is_no_success(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--hold_window" in text
    assert "[our choice]" in text and "[our choice] this project's" in text and "[HF] the\nname" in text
    assert "CSV" in text
    assert "quickstart" in text
    assert cli.main(["train"]) == 2


def test_eval_hands_its_settings_on_and_shows_the_results(monkeypatch, capsys, tmp_path):
    seen = []

    class Evaluation:
        @staticmethod
        def evaluate(config):
            seen.append(config)
            print("on the way")
            return tmp_path

    results = Printout(["average@2", f"report: {tmp_path / 'results.html'}"], {"metrics": {"average@2": 0.5}})
    monkeypatch.setattr("atesd.evaluation.report.printout", lambda folder: results if folder == tmp_path else None)
    monkeypatch.setitem(sys.modules, "atesd.evaluation.command", Evaluation)
    monkeypatch.setattr("atesd.evaluation.command", Evaluation, raising=False)
    assert cli.main(["eval", "--model", "m", "--data", "d.jsonl", "--k", "2"]) == 0
    assert (seen[0].model_name_or_path, seen[0].num_generations, seen[0].output_dir) == ("m", 2, "evals/d-m")
    text = capsys.readouterr().out
    assert "on the way" in text and "average@2" in text and "results.html" in text
    assert cli.main(["eval", "--model", "m", "--data", "d.jsonl", "--k", "2", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"metrics": {"average@2": 0.5}} and "on the way" in told.err


def test_eval_help_explains_the_protocol_and_a_mistyped_flag_is_refused_by_name(capsys):
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--max_new_tokens" in text and "[OPSD] arXiv" in text and "--compare" in text
    assert "atesd eval --adapter RUN [--model PATH] --data" in text
    assert cli.main(["eval"]) == 2
    assert cli.main(["eval", "--model", "m", "--data", "d", "--temprature", "1"]) == 2
    assert "did you mean temperature" in capsys.readouterr().err


def test_report_draws_the_page_and_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    with RunLog(tmp_path / "run", None) as log:
        log.log(1, {"loss": 1.0})
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "is no run directory" in capsys.readouterr().err


def test_an_error_nobody_wrote_for_people_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "report", lambda run_dir: [][1])
    with pytest.raises(IndexError):
        cli.main(["report", "x"])


@pytest.mark.parametrize("error", [EvalError, ReportError, RolloutError, ShardingError, ModelLoadError, NonFiniteLoss])
def test_an_error_of_ours_shows_its_message_wherever_it_was_raised(monkeypatch, capsys, error):
    def fails(run_dir):
        raise error("too long: make it shorter")  # in a file of the tests, so only the class says that it is ours

    monkeypatch.setattr(cli, "report", fails)
    assert cli.main(["report", "x"]) == 1
    assert capsys.readouterr().err == "atesd: too long: make it shorter\n"
    monkeypatch.setenv("ATESD_TRACEBACK", "1")
    with pytest.raises(error):
        cli.main(["report", "x"])


@pytest.mark.parametrize("command", [
    ["report", "nowhere"],
    ["merge", "nowhere", "--output_dir", "out"],
    ["eval", "--compare", "a", "b"],
    ["train", "quickstart", "--max_step", "2"],
])  # fmt: skip
def test_a_refusal_is_one_message_without_a_hint_at_the_traceback(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("atesd: ") and "TRACEBACK" not in said
    monkeypatch.setenv("ATESD_TRACEBACK", "1")
    with pytest.raises(AtesdError):
        cli.main(command)


def test_a_built_in_error_of_the_losses_names_the_way_to_its_traceback(monkeypatch, capsys):
    import torch

    from atesd_kernels import linear_divergence

    rows = torch.zeros(2, 4)
    wrong = {"divergence": "no_such"}
    monkeypatch.setattr(cli, "report", lambda run_dir: linear_divergence(rows, torch.zeros(8, 4), rows, **wrong))
    assert cli.main(["report", "x"]) == 1
    said = capsys.readouterr().err
    assert "no_such" in said and said.endswith("(ATESD_TRACEBACK=1 shows where this was raised)\n")


def test_every_error_class_of_atesd_is_an_atesd_error_and_a_built_in_one():
    files = [path.read_text(encoding="utf-8") for path in Path(atesd.__file__).parent.rglob("*.py")]
    bases = re.findall(r"^class \w+\((.*(?:Error|Exception))\):", "\n".join(files), re.MULTILINE)
    assert bases.count("Exception") == 1 and len(bases) >= 9
    built_in = {f"AtesdError, {name}" for name in ("ValueError", "RuntimeError", "ImportError", "OSError")}
    assert set(bases) <= {"Exception", *built_in}


def test_a_stray_argument_is_a_usage_error(capsys):
    for arguments in (["--b"], ["report", "a", "--b"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


def test_versions_are_told_where_atesd_is_only_on_the_path_and_torch_names_its_build(capsys, monkeypatch):
    import torch

    from bench import machine

    def hidden(name, distribution=metadata.distribution):
        if name == "atesd":
            raise metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(metadata, "distribution", hidden)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")  # the metadata of PyPI's torch says 2.11.0
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"^ *atesd +{re.escape(atesd.__version__)}$", told, re.MULTILINE)
    assert re.search(r"^ *torch +2\.11\.0\+cu130$", told, re.MULTILINE)
    assert machine.versions()["torch"] == "2.11.0+cu130"
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and atesd.__version__ in capsys.readouterr().out


def test_doctor_names_versions_devices_and_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a user's shell is
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    import torch

    assert torch.__version__ in text
    for line in ("cores", "triton", "vllm", "smollm2"):
        assert line in text
    if not torch.cuda.is_available():
        assert re.search(r"^  triton +not available: ", text, re.MULTILINE)
