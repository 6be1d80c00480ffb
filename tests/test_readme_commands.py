"""Every shell command of the front page and the manuals is one the project takes: the real command line parses it, and
only the training, evaluating and drawing behind it are left out. (The Python blocks run in the files beside.)"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from atesd import cli
from atesd.config import load_config
from atesd.reports.printout import Printout

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "atesd_kernels/README.md", "atesd/README.md", "bench/README.md")]
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)
BASH = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [words for block in BASH for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def begins(*words: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(words)] == list(words)]


ATESD = [c[1:] for c in begins("atesd")] + [c[c.index("atesd") + 1 :] for c in begins("accelerate", "launch")]


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """The work behind the commands, replaced; a folder with the files and runs README speaks of."""
    monkeypatch.chdir(tmp_path)
    Path("my_run.yaml").write_text("extends: quickstart\n")
    Path("my.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    load_config("quickstart", ["--output_dir", "runs/my_run"]).save("runs/my_run")
    done = []

    def record(name, result):
        return lambda *arguments, **options: (done.append((name, arguments)), result)[1]

    nothing = Printout([], {})
    for name in ("evaluation.report", "evaluation.compare", "studies.sweep", "studies.study_report"):
        monkeypatch.setattr(f"atesd.{name}.printout", lambda *_: nothing)
    monkeypatch.setattr("atesd.trainer.train", record("train", Path("runs/my_run")))
    monkeypatch.setattr("atesd.planning.dry_run.dry_run", record("dry run", nothing))
    monkeypatch.setattr("atesd.studies.study.run_study", record("study", Path("runs")))
    monkeypatch.setattr("atesd.studies.lab.pretrain.make_lab", record("lab", Path("lab")))
    monkeypatch.setattr("atesd.studies.sweep.sweep", record("sweep", Path("runs")))
    monkeypatch.setattr("atesd.evaluation.command.evaluate", record("eval", Path("evals")))
    monkeypatch.setattr("atesd.evaluation.compare.compare", record("compare", Path("evals")))
    monkeypatch.setattr("atesd.reports.report.write_report", record("report", Path("report.html")))
    monkeypatch.setattr("atesd.merge.merge", record("merge", ""))
    monkeypatch.setattr("atesd.planning.scaling.main", record("scaling", nothing))
    return done


@pytest.mark.parametrize("argv", ATESD, ids=" ".join)
def test_a_command_of_the_readme_is_taken(argv, nothing_runs, capsys):
    code = cli.main(argv)
    assert code == 0, capsys.readouterr().err
    assert nothing_runs or "--help" in argv


def test_a_command_that_is_not_taken_would_be_seen(nothing_runs, capsys):
    assert cli.main(["train", "my_run.yaml", "--exposure_polcy", "full"]) == 2
    assert cli.main(["train", "quickstat"]) == 2
    assert not nothing_runs


def test_the_other_commands_name_what_there_is(monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {c[1] for c in begins("make")} <= set(targets)
    declared = {}
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", declared.update)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = declared["extras_require"]
    asked = [re.fullmatch(r"atesd\[([\w-]+)\]", word) for c in begins("pip", "install") for word in c[2:]]
    assert asked and {match[1] for match in asked if match} <= set(extras)
    configs = ROOT / "atesd" / "recipes" / "accelerate"
    launched = [c[c.index("--config_file") + 1].split("/")[-1] for c in begins("accelerate", "launch")]
    assert launched and all((configs / name).is_file() for name in launched)
    assert {c[1] for c in begins("vllm")} == {"serve"}
    rest = [c for c in COMMANDS if c[0] not in ("make", "atesd", "pip", "accelerate", "vllm")]
    # shell variables before a command, or set for the next ones
    assert all(re.match(r"[A-Z_]+=", c[0]) for c in rest), rest
