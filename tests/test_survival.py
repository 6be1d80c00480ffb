"""A run survives company, other inputs, damage, signals and a full disk; or says by name why it does not go on."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from atesd import cli
from atesd.config import load_config
from atesd.data.prompts import PromptTooLong
from atesd.errors import AtesdError, ConfigError, StorageError
from atesd.files import replaced_folder, write_atomically
from atesd.rollout.connections import Refused
from atesd.run import Run
from atesd.stopping import Stopped
from atesd.storage.checkpoint import CheckpointError, list_checkpoints
from atesd.trainer import NonFiniteLoss, Trainer, train
from tests.run_logs import resume, rows_of


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# company


@pytest.mark.parametrize("setting", [{"max_prompt_length": 8}, {"lora_target_modules": "nowhere"}])
def test_a_refused_start_leaves_no_folder(tiny_config, setting):
    config = tiny_config(**setting)
    with pytest.raises(AtesdError):
        train(config)
    assert not Path(config.output_dir).exists()


# other inputs


def changed_words(data: Path, model: Path) -> None:
    data.write_text(data.read_text().replace("Ann", "Bea", 1))


def changed_order(data: Path, model: Path) -> None:
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))


def fewer_problems(data: Path, model: Path) -> None:
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-3]))


def other_template(data: Path, model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("|>' + m", "|> ' + m"))


def other_weights(data: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)


def other_tokenizer(data: Path, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_words, "problems"),
        (changed_order, "the training problems"),
        (fewer_problems, "the training problems"),
        (other_template, "the chat template"),
        (other_weights, "the base model's files"),
        (other_tokenizer, "the tokenizer"),
    ],
)
def test_a_run_does_not_go_on_with_other_inputs_unless_told_to(
    tiny_config, tiny_model_path, sums, tmp_path, change: Callable[[Path, Path], None], named
):
    data, model = tmp_path / "sums.jsonl", tmp_path / "model"
    shutil.copy(sums, data)
    shutil.copytree(tiny_model_path, model)
    run_dir = train(tiny_config(dataset_name=str(data), model_name_or_path=str(model), max_steps=1))
    change(data, model)
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"(?s){named}.*--allow_changed_inputs"):
        train(resume(run_dir, "--max_steps", "2"))
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    train(resume(run_dir, "--max_steps", "2", "--allow_changed_inputs"))
    assert named in " ".join(json.loads((run_dir / "summary.json").read_text())["changed_inputs"])
    train(resume(run_dir, "--max_steps", "3"))  # it goes on from what it last read
    assert named in " ".join(json.loads((run_dir / "summary.json").read_text())["changed_inputs"])


def test_other_prompt_templates_under_the_same_name_are_other_inputs(tiny_config, tmp_path):
    templates = tmp_path / "templates.yaml"
    templates.write_text("student: 'Solve: {problem}'\n")
    run_dir = train(tiny_config(prompt_templates=str(templates), max_steps=1))
    templates.write_text("student: 'Please solve: {problem}'\n")
    with pytest.raises(ConfigError, match="the prompt templates changed since"):
        train(resume(run_dir, "--max_steps", "2"))


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("lora_r", 8), ("gradient_accumulation_steps", 1)])
def test_an_edited_config_is_held_against_the_checkpoint(tiny_config, name, value):
    run_dir = train(tiny_config(max_steps=1))
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings | {name: value}))
    with pytest.raises(ConfigError, match=rf"{name} is {value}, but the checkpoint in .* was started with"):
        train(resume(run_dir, "--max_steps", "2"))


# damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_kept_and_passed_over(tiny_config, capsys):
    run_dir = train(tiny_config(max_steps=4))
    flip(list_checkpoints(run_dir)[-1][1] / "state.pt")
    with pytest.raises(CheckpointError, match=r"step-000004: state\.pt has changed .*goes on from .*step-000002"):
        train(resume(run_dir, "--max_steps", "5", "--no_allow_older_checkpoint"))
    train(resume(run_dir, "--max_steps", "5"))
    assert "step-000004 is damaged: state.pt has changed" in capsys.readouterr().out
    assert names(run_dir) == ["damaged-step-000004", "step-000004", "step-000005"]
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3, 4, 5]


def test_a_run_without_a_whole_checkpoint_is_refused(tiny_config):
    run_dir = train(tiny_config(max_steps=2))
    flip(list_checkpoints(run_dir)[-1][1] / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed.*no older one is whole"):
        train(resume(run_dir, "--max_steps", "3"))


@pytest.mark.parametrize("folder_too", [True, False])
def test_a_run_whose_checkpoints_are_gone_keeps_its_log(tiny_config, folder_too):
    run_dir = train(tiny_config(max_steps=4))
    shutil.rmtree(run_dir / "checkpoints")
    if not folder_too:
        (run_dir / "checkpoints").mkdir()
        (run_dir / "summary.json").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        train(resume(run_dir, "--max_steps", "5"))
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "shape", "number"])
def test_a_payload_of_a_wrong_shape_is_a_named_error(tiny_config, kind):
    run = Run.build(tiny_config())
    state = run.state_dict()
    if kind == "missing":
        del state["optimizer"]
    elif kind == "shape":
        name = next(iter(state["trained"]))
        state["trained"][name] = torch.zeros(2, 2)
    else:
        state["sampler"] = 3
    run.state_dict = lambda: state
    run.save()
    run.close()
    with pytest.raises(CheckpointError, match=r"step-000000 does not fit the run"):
        Run.build(resume(run.run_dir))


def test_torn_and_foreign_lines_of_the_log_are_set_aside(tiny_config):
    run_dir = train(tiny_config(max_steps=2))
    log = run_dir / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b'{"step": 2, "lo\n' + b"\xff\xfe\n" + b'["mine"]\n' + lines[1] + b'{"st')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has 3 damaged lines"):
        train(resume(run_dir, "--max_steps", "3"))
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3]
    assert (run_dir / "metrics.jsonl.damaged").read_bytes() == b'{"step": 2, "lo\n\xff\xfe\n["mine"]\n'


def test_a_run_that_diverged_keeps_its_last_good_checkpoint_and_goes_on_from_it(tiny_config, monkeypatch):
    update = Trainer.update

    def ruins_the_weights(self, loss):
        norm = update(self, loss)
        if self.run.step == 2 and self.run.config.learning_rate > 1e-4:
            with torch.no_grad():
                for p in self.run.student.trained.values():
                    p.fill_(1e30)
        return norm

    monkeypatch.setattr(Trainer, "update", ruins_the_weights)
    config = tiny_config(max_steps=9, save_steps=1, save_total_limit=1, max_nonfinite_steps=3)
    with pytest.raises(NonFiniteLoss, match=r"go on from step-000002 with atesd train --resume .* and a lower"):
        train(config)
    run_dir = Path(config.output_dir)
    assert names(run_dir) == ["diverged-step-000006", "step-000002"]
    train(resume(run_dir, "--learning_rate", "1e-5", "--max_steps", "4"))
    assert [(row["step"], row["skipped"]) for row in rows_of(run_dir)] == [(step, 0) for step in (1, 2, 3, 4)]


# the system


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_which_is_saved(tiny_config, monkeypatch, number):
    step = Trainer.train_step

    def signalled(self, t):
        if t == 1 and self.run.config.max_steps == 5:
            os.kill(os.getpid(), number)
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped, match="saved as it was after step 2") as stopped:
            train(tiny_config(max_steps=5, save_steps=4))
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert stopped.value.signal == number
    run_dir = Path(tiny_config().output_dir)
    assert names(run_dir) == ["step-000002"]
    train(resume(run_dir, "--max_steps", "3"))
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3]


@pytest.mark.parametrize(("place", "told"), [("build_data", "atesd: stopped\n"), ("finish", "go on with: atesd train")])
def test_sigterm_outside_a_step_ends_a_command_as_ctrl_c_does(tiny_config, monkeypatch, capsys, tmp_path, place, told):
    """While it starts, nothing stays; at its end, what is saved is named."""
    settings = {name: value for name, value in vars(tiny_config(max_steps=1)).items() if value is not None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(Run, place, lambda self: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told in capsys.readouterr().err
    assert Path(settings["output_dir"]).exists() == (place == "finish")


def test_a_run_that_goes_on_before_its_first_checkpoint_sets_foreign_lines_aside(tiny_config):
    run_dir = train(tiny_config(max_steps=1))
    for name in ("checkpoints", "summary.json"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run_dir / "checkpoints").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("a note of the user\n")
    with pytest.warns(UserWarning, match="1 damaged lines, e.g. b'a note of the user'"):
        train(resume(run_dir))
    assert (run_dir / "metrics.jsonl.damaged").read_text() == "a note of the user\n"
    assert [row["step"] for row in rows_of(run_dir)] == [1]


def test_foreign_lines_that_look_like_steps_are_set_aside(tiny_config, capsys):
    run_dir = train(tiny_config(max_steps=1))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss": "abc", "alpha": {"a": 1}, "seconds_rollout": "x"}\n')
    assert cli.main(["report", str(run_dir)]) == 0
    with pytest.warns(UserWarning, match="1 damaged lines"):
        train(resume(run_dir, "--max_steps", "2"))
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2]


def test_a_run_of_an_older_version_without_save_steps_goes_on(tiny_config):
    run_dir = train(tiny_config(max_steps=1))
    settings = (run_dir / "config.yaml").read_text().splitlines(keepends=True)
    (run_dir / "config.yaml").write_text("".join(line for line in settings if not line.startswith("save_steps")))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "summary.json").unlink()
    train(resume(run_dir))
    assert [row["step"] for row in rows_of(run_dir)] == [1]


def test_settings_of_a_run_that_are_not_utf_8_are_named_by_every_command(tiny_config, tmp_path, capsys):
    run_dir = train(tiny_config(max_steps=1))
    (run_dir / "config.yaml").write_bytes(b"seed: 1 # \xff\n")
    commands = ["report {}", "merge {} --output_dir {}/../merged", "train --resume {}", "eval --adapter {} --model x"]
    for command in commands:
        assert cli.main(command.replace("{}", str(run_dir)).split()) in (1, 2), command
        told = capsys.readouterr().err
        assert "config.yaml is not valid YAML in UTF-8" in told or command.startswith("eval"), (command, told)


@pytest.mark.parametrize("place", ["finish", "log"])
@pytest.mark.parametrize(("number", "fault"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "is read-only")])
def test_a_disk_that_fails_is_a_named_error_after_which_nothing_is_lost(tiny_config, monkeypatch, place, number, fault):
    def fails(*arguments, **rest):
        raise RuntimeError(f"Error while serializing: {os.strerror(number)} (os error {number})")

    with monkeypatch.context() as patch:
        patch.setattr(*{"finish": (Run, "finish"), "log": ("atesd.reports.metrics.RunLog.sample",)}[place], fails)
        with pytest.raises(StorageError, match=f"{fault}.*go on with: atesd train --resume"):
            train(tiny_config(max_steps=2))
    run_dir = Path(tiny_config().output_dir)
    train(resume(run_dir))
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2] and (run_dir / "adapter").is_dir()


def test_a_finished_run_says_so_and_writes_nothing(tiny_config, capsys):
    run_dir = train(tiny_config(max_steps=1))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name not in ("config.yaml", ".lock")}
    train(resume(run_dir))
    assert "the run is finished after step 1" in capsys.readouterr().out
    changed = [path for path, time in before.items() if path.is_file() and path.stat().st_mtime_ns != time]
    assert not changed


def test_a_run_given_more_steps_is_finished_once_their_results_are_written(tiny_config, monkeypatch):
    """Its summary of fewer steps lies there when the end fails."""
    run_dir = train(tiny_config(max_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr("atesd.run.write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(StorageError, match="the disk is full"):
            train(resume(run_dir, "--max_steps", "2"))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 1
    train(resume(run_dir))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
    assert not list(run_dir.glob(".*ing-*")) and not list(run_dir.glob(".replaced-*"))


@pytest.mark.parametrize("summary", ["", "[]", '{"steps": null}', "{"])
def test_a_damaged_summary_is_written_again(tiny_config, summary):
    run_dir = train(tiny_config(max_steps=1))
    (run_dir / "summary.json").write_text(summary)
    train(resume(run_dir))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 1


def test_a_resume_that_is_refused_leaves_the_settings_as_they_were(tiny_config, monkeypatch):
    run_dir = train(tiny_config(max_steps=1))
    before = (run_dir / "config.yaml").read_text()
    monkeypatch.setattr("atesd.run.keep_inputs", lambda *_: (_ for _ in ()).throw(ConfigError("other inputs")))
    with pytest.raises(ConfigError, match="other inputs"):
        train(resume(run_dir, "--learning_rate", "1", "--max_steps", "2"))
    assert (run_dir / "config.yaml").read_text() == before


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "best") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best/deep/file").read_text() == "new"


def kinds_of(error: type) -> set[type]:
    return {error}.union(*map(kinds_of, error.__subclasses__()))


def test_every_error_for_people_comes_whole_out_of_another_process():
    made = {
        PromptTooLong: PromptTooLong("p1", "student prompt", 9, 8, "drop it"),
        Refused: Refused(404, "no such model"),
        Stopped: Stopped("saved", signal.SIGTERM),
    }
    for kind in [*kinds_of(AtesdError), Stopped]:
        error = made.get(kind) or kind("what, and what to do")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_a_small_file_is_old_or_new_whatever_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fails(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError):
                write_atomically(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_yaml_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("dataset_name: sümme.jsonl\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML in UTF-8"):
        load_config(str(path), [])
