"""Uploads to the Hub: refused before the work where there is no token, and never at the cost of what was written.

A stand-in takes the place of huggingface_hub's HfApi: no test asks a server.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from atesd import cli
from atesd.config import ATESDConfig
from atesd.errors import ConfigError
from atesd.hub import HubError, check_push, push_folder, unreachable
from atesd.studies.sweep import sweep
from atesd.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")


class Hub:
    """What HfApi was asked for; `refuses` names the call that fails."""

    def __init__(self):
        self.made, self.uploaded, self.refuses = [], {}, None

    def create_repo(self, repo_id, exist_ok):
        self.answer("create_repo")
        self.made.append(repo_id)

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        self.answer("upload_folder")
        assert ignore_patterns == [".*"]
        self.uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    def answer(self, call):
        if self.refuses == call:
            raise huggingface_hub.errors.HTTPError("403 Forbidden")


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return made


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_end_of_a_run_uploads_its_adapter_or_its_model(hub, tiny_config, use_peft, capsys):
    run_dir = train(tiny_config(push_to_hub="me/mine", use_peft=use_peft, max_steps=1))
    written = run_dir / ("adapter" if use_peft else "model")
    assert set(hub.uploaded["me/mine"]) == {path.name for path in written.iterdir()}
    assert ("adapter_config.json" in hub.uploaded["me/mine"]) == use_peft
    assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out
    if use_peft:  # the Hub refuses a card whose base model is a path
        assert b"base_model: /" not in hub.uploaded["me/mine"]["README.md"]


def test_a_finished_run_is_uploaded_when_it_is_resumed_with_the_flag(hub, tiny_config):
    run_dir = train(tiny_config(max_steps=1))
    assert not hub.made
    assert cli.main(["train", "--resume", str(run_dir), "--push_to_hub", "me/mine"]) == 0
    assert "adapter_model.safetensors" in hub.uploaded["me/mine"]


def test_merge_uploads_the_merged_model(hub, tiny_config, tmp_path, capsys):
    run_dir, out = train(tiny_config(max_steps=1)), tmp_path / "merged"
    assert cli.main(["merge", str(run_dir), "--output_dir", str(out), "--push_to_hub", "me/merged"]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.uploaded["me/merged"])
    assert "huggingface.co/me/merged" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "setting", "says"), [
    ("me/mine", "no token", "hf auth login"),
    ("me/mine", "offline", "HF_HUB_OFFLINE is set"),
    ("me/mine/more", None, "is no name of a repository"),
    ("", None, "is no name of a repository"),
])  # fmt: skip
def test_what_cannot_be_uploaded_is_refused_before_anything_starts(
    hub, monkeypatch, tiny_config, tmp_path, capsys, name, setting, says
):
    if setting == "no token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "offline")
    with pytest.raises(ConfigError, match="push_to_hub"):
        train(tiny_config(push_to_hub=name))
    with pytest.raises(ConfigError, match=says):
        check_push(name)
    command = ["merge", str(tmp_path), "--output_dir", str(tmp_path / "merged"), "--push_to_hub", name]
    assert cli.main(command) == 2 and says in capsys.readouterr().err
    assert not hub.made and not (tmp_path / "run").exists() and not (tmp_path / "merged").exists()


def test_a_token_that_may_not_write_is_found_before_the_first_step(hub, tiny_config, tmp_path):
    hub.refuses = "create_repo"
    with pytest.raises(HubError, match=r"'me/mine' cannot be made or written to .*403"):
        train(tiny_config(push_to_hub="me/mine"))
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_run_and_names_the_command(hub, tiny_config, tmp_path):
    hub.refuses = "upload_folder"
    with pytest.raises(HubError, match=f"hf upload me/mine {tmp_path}/run/adapter"):
        train(tiny_config(push_to_hub="me/mine", max_steps=1))
    assert (tmp_path / "run" / "summary.json").is_file() and (tmp_path / "run" / "report.html").is_file()


def test_a_card_that_names_a_model_of_the_hub_stays_as_it_is(hub, tmp_path):
    card = "---\nbase_model: Qwen/Qwen3-1.7B\nlibrary_name: peft\n---\n\n# Mine\n"
    (tmp_path / "README.md").write_text(card)
    push_folder(tmp_path, "me/mine")
    assert hub.uploaded["me/mine"]["README.md"].decode() == card


def test_a_sweep_refuses_a_repository_for_its_many_runs(hub, tiny_config, tmp_path, tiny_model_path, sums):
    flags = ["--model_name_or_path", str(tiny_model_path), "--dataset_name", str(sums), "--push_to_hub", "me/mine"]
    with pytest.raises(ConfigError, match="a study has many runs"):
        sweep("quickstart", flags, str(tmp_path / "sweep"), [0.5], [0])
    assert not (tmp_path / "sweep").exists()


def test_a_configuration_without_the_setting_asks_for_no_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("asked"))
    ATESDConfig(num_train_problems=4, output_dir="somewhere").validate()


def a_chain(first, *others):
    """An error and those that it came from."""
    error = None
    for each in reversed((first, *others)):
        each.__cause__, error = error, each
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            a_chain(OSError("We couldn't connect"), LocalEntryNotFoundError("x"), OSError(-2, "Name not known")),
            "Name not",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "Couldn't reach"),
        (a_chain(ValueError("no"), TimeoutError("timed out")), "timed out"),
        (ValueError("Unknown split"), None),
        (FileNotFoundError("no such data set on the Hub"), None),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_with_the_cause_and_with_what_else_there_is(monkeypatch, error, cause):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    told = unreachable(error)
    assert (told is None) == (cause is None)
    if told:
        assert "the Hub cannot be reached" in told and cause in told and "HF_HUB_OFFLINE=1" in told
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "unset it" in unreachable(error) and constants.HF_HOME in unreachable(error)
