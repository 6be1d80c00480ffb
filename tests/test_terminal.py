"""What the terminal shows: no control characters from anybody's text, and bars that move."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import warnings
from pathlib import Path

import pytest
import yaml

import atesd
from atesd import cli, terminal
from atesd.errors import DataError
from atesd.stopping import StopSignals
from atesd.terminal import advance, printable, progress, show

CLEAR = "\x1b[2J\x1b[1;1H"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_for(monkeypatch):
    """Makes stderr a terminal that shows every move of a bar. Called in the test: pytest sets stderr before it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "REFRESH_SECONDS", 0.0)
    return screen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a{CLEAR}b", r"a\x1b[2J\x1b[1;1Hb"),
        ("title\x1b]0;owned\x07", r"title\x1b]0;owned\x07"),
        ("right\rwrong", r"right\rwrong"),
        ("8-bit \x9b31m", r"8-bit \x9b31m"),
        ("file\udcff.jsonl", r"file\udcff.jsonl"),  # a name that is not UTF-8
        ("abc\u202efed", r"abc\u202efed"),
        ("Größe 3 ≥ π, 家, 👩‍🔬\n\tend", "Größe 3 ≥ π, 家, 👩‍🔬\n\tend"),
    ],
)
def test_what_could_act_on_the_terminal_is_written_out(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize("error", [DataError(f"row {CLEAR} is empty"), OSError(f"{CLEAR}: no such file")])
def test_an_error_shows_no_escape_sequence(error, monkeypatch, capsys):
    def fails(run_dir):
        raise error

    monkeypatch.setattr(cli, "report", fails)
    if isinstance(error, DataError):
        assert cli.main(["report", "x"]) == 1
    else:
        with pytest.raises(OSError, match="no such file"):
            cli.main(["report", "x"])
        sys.excepthook(type(error), error, error.__traceback__)
    written = capsys.readouterr().err
    assert r"\x1b[2J" in written and "\x1b" not in written


def test_a_command_shows_no_escape_sequence_of_a_file_or_its_name(tmp_path):
    """From outside, as a user meets it: an unknown key of a YAML file, in a folder with a hostile name."""
    recipe = tmp_path / f"my{CLEAR}recipe.yaml"
    recipe.write_text('"max\\e[2J_steps": 3\n', encoding="utf-8")
    command = [sys.executable, "-m", "atesd", "train", str(recipe)]
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 2
    assert b"\x1b" not in result.stdout + result.stderr
    assert rb"\x1b[2J" in result.stderr


def test_a_warning_is_a_line_without_its_place_in_the_source(monkeypatch, capsys):
    def warns(run_dir):  # pytest records warnings, so this asks for the text that Python would show
        print(warnings.formatwarning(f"skipped {CLEAR}", UserWarning, __file__, 1), end="")
        return 0

    monkeypatch.setattr(cli, "report", warns)
    before = warnings.formatwarning
    assert cli.main(["report", "x"]) == 0
    assert capsys.readouterr().out == "atesd: warning: skipped \\x1b[2J\\x1b[1;1H\n"
    assert warnings.formatwarning is before


def test_nothing_else_in_atesd_prints():
    """One way to the terminal, so that nobody forgets to make text printable."""
    loud = []
    for path in Path(atesd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write", "sys.stderr.write"):
                loud.append(path.name)
    assert set(loud) == {"terminal.py"}


def test_a_phase_moves_per_response_and_is_gone_at_its_end(monkeypatch):
    screen = terminal_for(monkeypatch)
    with progress("rollouts", 4):
        advance(0, "token 1 of 8")
        advance(1, "token 2 of 8")
        advance(3, "token 8 of 8")
    written = screen.getvalue()
    for part in ("rollouts, token 1 of 8:", "1/4", "4/4"):
        assert part in written
    last = written.rstrip("\r").rpartition("\r")[2]
    assert last.isspace()  # the bar is wiped


def test_a_response_asked_for_again_is_counted_once(monkeypatch):
    terminal_for(monkeypatch)
    with progress("rollouts", 2) as bar:
        advance(2)
        advance(2)
        assert bar.n == 2


def test_an_inner_phase_has_the_bar_and_gives_it_back(monkeypatch):
    terminal_for(monkeypatch)
    with progress("samples", 2) as outer:
        with progress("evaluation", 3) as inner:
            advance(3)
        advance(1)
    assert (outer.n, inner.n) == (1, 3)


def test_a_thread_in_the_background_moves_no_bar_of_the_foreground(monkeypatch):
    terminal_for(monkeypatch)
    with progress("evaluation", 5) as bar:
        thread = threading.Thread(target=advance, args=(1,))
        thread.start()
        thread.join()
        assert bar.n == 0


def test_a_log_gets_no_bars_of_phases(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress("rollouts", 2):
        advance(1)
    advance(1)  # outside of any phase
    assert log.getvalue() == ""


def test_a_message_stands_above_a_bar(monkeypatch, capsys):
    terminal_for(monkeypatch)
    with progress("rollouts", 2):
        show("resent")
    assert capsys.readouterr().out == "resent\n"


def test_a_run_says_what_it_does_and_nothing_of_its_libraries(tiny_config, tmp_path):
    """A terminal of its own: bars and warnings are shown as a user sees them."""
    config = tiny_config(max_steps=1, gradient_checkpointing=True, eval_steps=1, num_eval_problems=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8")
    main, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # tqdm shows nothing on 0 columns
    command = [sys.executable, "-W", "default", "-m", "atesd", "train", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=its, stderr=its, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(its)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal on Linux
        while piece := os.read(main, 65536):
            shown += piece.decode()
    os.close(main)
    assert process.wait() == 0, shown
    for own in ("run directory:", "evaluation", "rollouts", "report:"):
        assert own in shown
    for noise in ("Loading weights", "Generating train split", "FutureWarning", "deprecated"):
        assert noise not in shown


# a reader that leaves


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--version"], []])
def test_a_command_whose_reader_has_left_ends_without_a_word(arguments, unread):
    """`atesd train --help | head -3`: some of it is written by argparse, which ends with 0."""
    command = [sys.executable, "-m", "atesd", *arguments]
    result = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, timeout=120)
    assert result.stderr == b"" and result.returncode in ((0, 1) if arguments == ["--version"] else (1,))


def test_an_error_is_told_to_whom_reads_it_or_to_nobody(unread):
    command = [sys.executable, "-m", "atesd", "trian"]
    told = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, timeout=120)
    assert told.returncode == 2 and b"did you mean train" in told.stderr
    assert subprocess.run(command, stdout=unread, stderr=unread, timeout=120).returncode == 1


def test_a_broken_pipe_that_is_not_the_readers_passes_through():
    with pytest.raises(BrokenPipeError, match="of a server"), terminal.while_it_is_read():
        raise BrokenPipeError("of a server")


@pytest.mark.parametrize("write", [lambda: show("step 1"), lambda: list(terminal.steps_bar(0, 2, hidden=False))])
def test_a_run_whose_reader_has_left_ends_after_its_step_and_not_within(write, unread, monkeypatch):
    signals = StopSignals()
    stream = os.fdopen(os.dup(unread), "w")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with signals.deferred():
        write()
        assert signals.received == signal.SIGPIPE
        write()
    stream.close()


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_that_ends_tee_as_well_leaves_a_saved_run(tiny_config, unread, monkeypatch):
    config = tiny_config(save_steps=100, max_steps=4)
    config.save(config.output_dir)
    recipe = Path(config.output_dir) / "config.yaml"
    recipe = recipe.rename(recipe.parent.with_name("tiny.yaml"))
    script = """
import os, signal, sys
from atesd import cli
from atesd.trainer import Trainer

step, closed = Trainer.train_step, int(sys.argv[1])

def interrupted(self, t):
    os.dup2(closed, 1)
    os.dup2(closed, 2)
    signal.raise_signal(signal.SIGINT)
    return step(self, t)

Trainer.train_step = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(sys.argv[2:]))
"""
    arguments = [str(unread), "train", str(recipe), "--output_dir", f"{config.output_dir}-2"]
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, pass_fds=[unread], timeout=240)
    assert result.returncode == 130, result.stderr.decode()[-2000:]
    assert [path.name for path in Path(f"{config.output_dir}-2", "checkpoints").iterdir()] == ["step-000001"]
