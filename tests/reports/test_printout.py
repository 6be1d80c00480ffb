"""What commands print: a table in a terminal, aligned columns in a pipe, and one JSON document with --json."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from atesd import cli
from atesd.reports.printout import Printout, Table, messages_to_stderr

PLAN = Table("plan", [["weights", "1.50 GiB", "held"], ["optimizer", "12.00 GiB", ""]], ["part", "size", "what"])


@pytest.fixture
def terminal(monkeypatch):
    """`terminal(width)`: standard output is a terminal of that many columns."""

    def pretend(width):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")

    return pretend


def test_a_pipe_gets_aligned_columns_without_a_box(capsys):
    Printout(["first", PLAN], {}).show()
    assert capsys.readouterr().out.splitlines() == [
        "first",
        "",
        "plan",
        "  part            size  what",
        "  weights     1.50 GiB  held",
        "  optimizer  12.00 GiB",
    ]


def test_a_terminal_gets_a_table_of_its_width(terminal, capsys):
    terminal(40)
    long = Table("", [["name", "a long remark " * 9]])
    Printout([PLAN, long], {}).show()
    lines = re.sub("\x1b\\[[\\d;]*m", "", capsys.readouterr().out).splitlines()
    assert "plan" in lines[0] and any("│" in line and "12.00 GiB" in line for line in lines)
    assert max(map(len, lines)) <= 40
    assert "".join(lines).count("long") == 9


RUNS = Table(
    "evaluations",
    [
        ["base", "smollm2-135m-instruct", "none", "gsm_symbolic", "4", "63.3 % [50.0, 76.7]", "1,024", "0.0 %"],
        ["mine", "smollm2-135m-instruct", "runs/mine/checkpoints/step-0100", "gsm_symbolic", "4", "70.0 %", "987", ""],
    ],
    ["run", "model", "adapter", "data", "k", "Average@k", "tokens", "truncated"],
)  # fmt: skip
REMARK = Table("", [["name", "a-word-of-many-letters " + "and a long remark " * 9], ["other", "b"]])
FOREIGN = Table("digits", [["家" * 15, "größe", "1"]], ["word", "other", "n"])


@pytest.mark.parametrize("table", [RUNS, REMARK, FOREIGN, PLAN], ids=lambda table: table.title or "remark")
@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_width_breaks_a_word(terminal, capsys, table, width):
    terminal(width)
    Printout([table], {}).show()
    text = re.sub("\x1b\\[[\\d;]*m", "", capsys.readouterr().out)
    assert max(map(cell_len, text.splitlines())) <= width
    words = re.sub("[│╭╮╰╯├┤┼─┬┴:]", " ", text).split()
    for cell in [*table.header, *(cell for row in table.rows for cell in row)]:
        for word in cell.split():
            assert word in words, (word, text)


def test_a_table_that_is_too_wide_is_a_block_of_lines_for_each_row(terminal, capsys):
    terminal(60)
    Printout([RUNS, Table("", [["a-name-of-thirty-characters-aa", "a-value-of-thirty-characters-a", ""]])], {}).show()
    told = re.sub("\x1b\\[[\\d;]*m", "", capsys.readouterr().out)
    assert "│" not in told and told.splitlines()[0] == "evaluations"
    first, second, third = told.split("\n\n")
    assert "run: base" in first and "Average@k: 63.3 % [50.0, 76.7]" in first
    assert second.splitlines()[0] == "run: mine" and "truncated" not in second
    assert third.split() == ["a-name-of-thirty-characters-aa:", "a-value-of-thirty-characters-a"]


@pytest.mark.parametrize("cell", ["[bold]not markup[/bold]", "[/]", ":smile:", "\\boxed{[1]}"])
def test_what_looks_like_markup_is_shown_as_it_is(terminal, capsys, cell):
    terminal(80)
    Printout([cell, Table(cell, [[cell, "1"]], [cell, "n"])], {}).show()
    assert capsys.readouterr().out.count(cell) == 4


def test_json_is_one_standard_document(capsys):
    Printout([PLAN], {"loss": math.nan, "by": {0.5: [math.inf, 1.0, "é"]}}).show(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "by": {"0.5": [None, 1.0, "é"]}}


def test_an_empty_table_prints_its_title_only():
    assert str(Printout([Table("none", [], ["a"])], {})).splitlines()[0] == "none"


def test_messages_of_this_process_and_of_others_leave_stdout_to_the_document(capfd):
    with messages_to_stderr(True):
        print("of this process", flush=True)
        subprocess.run(["echo", "of another"], check=True)
    print("{}", flush=True)
    with messages_to_stderr(False):
        print("as ever", flush=True)
    told = capfd.readouterr()
    assert told.out == "{}\nas ever\n" and "of this process" in told.err and "of another" in told.err


def document(argv, capsys):
    capsys.readouterr()
    assert cli.main(argv) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")
def test_commands_print_one_json_document(tiny_model_path, sums, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model_name_or_path", str(tiny_model_path), "--dataset_name", str(sums), "--num_probe_problems", "2"]
    plan = document(["train", *model, "--max_completion_length", "8", "--dry-run", "--json"], capsys)
    assert plan["problems"]["problems_used"] == 14 and plan["bytes"]["total"] > plan["bytes"]["weights"] > 0
    assert {prompt["prompt"].split(",")[0] for prompt in plan["prompts"]} == {"student", "teacher", "reference reply"}
    told = document(["doctor", "--json"], capsys)
    assert told["packages"]["peft"][0].isdigit() and "cores" in told["devices"]["cpu"]
    predicted = document(["scaling", "--json", "--lora_r", "8"], capsys)
    assert "rank 8" in predicted["assumptions"]
    assert predicted["models"]["Llama 3 70B"]["1"] is None
    assert predicted["models"]["Qwen3-8B"]["8"]["bytes"]["total"] > 1e9


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_and_a_comparison_print_one_json_document(tiny_model_path, sums, tmp_path, capsys):
    flags = ["--model", str(tiny_model_path), "--data", str(sums), "--num_problems", "2", "--k", "2", "--json"]
    for name, seed in (("a", "0"), ("b", "1")):
        own = ["--max_new_tokens", "4", "--seed", seed, "--output_dir", str(tmp_path / name)]
        found = document(["eval", *flags, *own], capsys)
        assert "average@2" in found["metrics"] and found["folder"] == str(tmp_path / name)
        assert found["settings"]["num_generations"] == 2
    pair = ["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "c")]
    assert document([*pair, "--json"], capsys)["pairs"][0]["b"] == "b"
    assert cli.main(pair) == 0
    assert "b - a" in capsys.readouterr().out


def test_json_without_a_dry_run_is_refused(tiny_model_path, sums, tmp_path, capsys):
    assert cli.main(["train", "quickstart", "--json", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "--dry-run" in said.err and said.out == "" and not (tmp_path / "run").exists()
