"""The lab: its documents match the prompts of a run, its shares are disjoint, and a run starts from what it makes."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from atesd import cli
from atesd.config import load_config
from atesd.data.prompts import PromptBuilder, PromptTemplates
from atesd.data.segmentation import split_reference
from atesd.errors import ConfigError
from atesd.storage.folder import OwnedFolder
from atesd.studies.lab import pretrain
from atesd.studies.lab.pretrain import document, make_lab, padded, teacher_message, walk
from atesd.studies.lab.world import (
    ASSISTANT,
    END,
    LENGTH,
    LETTERS,
    NUM_COMMON,
    TEMPLATES,
    USER,
    Machine,
    Word,
    draw,
    encode,
    tokenizer,
)
from atesd.trainer import train
from tests.quiet import quietly


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "lab"
    return quietly(lambda: make_lab(folder, steps=2))


def test_a_document_has_the_ids_of_the_prompts_and_replies_of_a_run():
    machine, rng = Machine(), random.Random(1)
    builder = PromptBuilder(tokenizer(), TEMPLATES, max_prompt_length=64, max_completion_length=40, context_length=256)
    for _ in range(8):
        word = draw(rng, LETTERS, "problems")
        problem = machine.problem(word)
        reference = split_reference(problem.solution, problem.answer)
        assert len(reference.segments) == LENGTH
        assert builder.student(problem) == encode(USER + word.text + ASSISTANT)
        for shown in range(LENGTH + 1):
            ids = builder.teacher(problem, reference, alpha=shown / LENGTH)
            message = teacher_message(machine, word, shown if shown < LENGTH else LENGTH + 1)
            assert ids == encode(USER + message + ASSISTANT)
        assert builder.reference_completion(reference)[0] == encode(problem.solution + END)
        assert tokenizer().decode(encode(problem.solution)) == problem.solution


def test_rare_letters_are_read_only_where_a_reference_shows_them():
    machine, rng = Machine(), random.Random(2)
    rare = {encode(letter)[0] for letter in LETTERS[NUM_COMMON:]}
    for bare in (True, False):
        documents = [document(machine, rng, bare) for _ in range(100)]
        seen = [rare & set(prompt) for prompt, _, _ in documents]
        assert any(seen) is not bare
        for prompt, _, _ in documents:
            shown = prompt[LENGTH + 4 :]  # after the problem's mark of the user, state, letters, "?" and "|"
            assert not rare & set(prompt) - set(shown)


def test_what_a_rare_letter_does_is_trained_only_where_a_reference_shows_it():
    """Else the bare student would know the rare letters from the lines that follow an error."""
    machine, rng, rare, kept = Machine(), random.Random(3), set(LETTERS[NUM_COMMON:]), 0
    for _ in range(300):
        prompt, response, trained = document(machine, rng, bare=False)
        text, shown = tokenizer().decode(response), tokenizer().decode(prompt)
        for number, line in enumerate(text.splitlines()[:LENGTH]):
            if line[1] in rare and trained[5 * number + 3]:
                assert line in shown
                kept += 1
    assert kept > 50


def test_a_run_goes_on_from_its_errors_and_does_not_learn_them():
    machine, word = Machine(), Word(7, ("c", "a", "f", "e"))
    states, wrong = walk(machine, word, random.Random(0), 0.5)
    before = [word.start, *states]
    for x, letter, y, bad in zip(before, word.letters, states, wrong, strict=False):
        assert bad or machine.table[letter][x] == y
    documents = [document(machine, random.Random(seed), bare=True) for seed in range(20)]
    ids, targets = padded(documents)
    assert ids.shape == targets.shape
    assert int((targets != -100).sum()) == sum(sum(trained) for _, _, trained in documents)
    assert any(not all(trained) for _, _, trained in documents)


def test_training_tuning_and_pretraining_share_no_problem():
    machine, rng = Machine(), random.Random(3)
    shares = [{p.problem for p in machine.problems(share, 300)} for share in ("problems", "tuning")]
    shares.append({draw(rng, LETTERS, "pretraining").text for _ in range(300)})
    assert all(len(share) > 290 for share in shares)
    assert not shares[0] & shares[1] and not shares[2] & (shares[0] | shares[1])


def test_a_run_of_the_recipe_starts_from_what_the_command_makes(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab.parent)
    assert PromptTemplates.from_file(lab / "templates.yaml") == TEMPLATES
    flags = "--max_steps 1 --per_device_train_batch_size 4 --num_eval_problems 4 --num_train_problems 8 --eval_steps 1"
    folder = tmp_path / "run"
    config = load_config("lab", [*flags.split(), "--num_probe_problems", "2", "--output_dir", str(folder)])
    quietly(lambda: train(config))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["skipped"] == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["dataset_name"].endswith("lab/problems.jsonl")


def test_a_folder_in_use_is_refused(lab):
    with pytest.raises(ConfigError, match=r"which holds .*: give a folder that is absent or empty"):
        make_lab(lab)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_lab_is_whole_or_absent(tmp_path, monkeypatch, error, capsys):
    def fails(*_):
        assert [path.name for path in (tmp_path / "lab").iterdir() if path.name != ".lock"] == [".writing-files"]
        raise error

    monkeypatch.setattr(pretrain, "pretrain", fails)
    assert cli.main(["lab", "--output_dir", str(tmp_path / "lab")]) in (1, 130)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


def test_one_process_at_a_time_makes_a_lab(tmp_path, start_atesd):
    with OwnedFolder(tmp_path):
        told = start_atesd("lab", "--output_dir", str(tmp_path)).communicate()[1]
    assert b"is being written by another process" in told
    assert not any(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lab_takes_the_model_of_another(lab, tmp_path):
    other = quietly(lambda: make_lab(tmp_path / "other", model=lab / "model"))
    for name in ("model/model.safetensors", "problems.jsonl", "tuning.jsonl", "templates.yaml"):
        assert (other / name).read_bytes() == (lab / name).read_bytes()
    with pytest.raises(ConfigError, match=r"no folder of a model: it has no config\.json"):
        make_lab(tmp_path / "third", model=tmp_path)
    assert not (tmp_path / "third").exists()
