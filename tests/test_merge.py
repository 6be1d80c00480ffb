"""`atesd merge`: the merged model computes what the run's student does, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd import cli, merge
from atesd.models import model_folder
from atesd.storage.checkpoint import latest_checkpoint
from atesd.trainer import train

IDS = torch.tensor([[5, 17, 33, 120, 7]])
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tiny_model_path, sums):
    """A finished run with an adapter and one that trained all weights; copy before you change them."""
    from atesd.config import ATESDConfig

    folder = tmp_path_factory.mktemp("runs")
    for name, use_peft in (("adapter", True), ("all", False)):
        train(ATESDConfig(
            model_name_or_path=str(tiny_model_path), dataset_name=str(sums), num_probe_problems=2, use_peft=use_peft,
            output_dir=str(folder / name), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
            max_prompt_length=512, max_completion_length=8, lora_r=4, lora_alpha=8, learning_rate=1e-2, save_steps=1,
            exposure_policy="full", max_grad_norm=10.0,
        ))  # fmt: skip
    return folder


@pytest.fixture
def runs(kept, tmp_path):
    return Path(shutil.copytree(kept, tmp_path / "runs"))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged_logits(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def adapted(base, adapter):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


def test_the_merged_model_of_a_run_is_its_student_with_tokenizer_and_generation_config(
    runs, tiny_model_path, tmp_path, capsys
):
    out = tmp_path / "merged"
    assert cli.main(["merge", str(runs / "adapter"), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert str(out) in said and "step-000002" in said and "float32" in said
    expected = adapted(tiny_model_path, runs / "adapter" / "adapter")
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_model_path))
    assert (merged_logits(out) - expected).norm() < 1e-4 * (expected - base).norm()
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names and "model.safetensors" in names
    assert not [name for name in names if name.startswith(".") or "adapter" in name]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "who may read one file may read all"
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (out, tiny_model_path))
    assert tokenizer.chat_template == before.chat_template and tokenizer.padding_side == before.padding_side


@pytest.mark.parametrize("what", ["a checkpoint", "its adapter", "the final adapter alone", "the best"])
def test_an_adapter_is_found_where_a_run_keeps_it(runs, tiny_model_path, tmp_path, what):
    run = runs / "adapter"
    first = run / "checkpoints" / "step-000001"
    if what == "the final adapter alone":
        shutil.rmtree(run / "checkpoints")
    if what == "the best":
        shutil.copytree(first / "adapter", run / "best" / "adapter")
    given, adapter = {
        "a checkpoint": (first, first / "adapter"),
        "its adapter": (first / "adapter", first / "adapter"),
        "the final adapter alone": (run, run / "adapter"),
        "the best": (run / "best", first / "adapter"),
    }[what]
    merge.merge(str(given), str(tmp_path / "merged"))
    assert torch.allclose(merged_logits(tmp_path / "merged"), adapted(tiny_model_path, adapter), atol=1e-5)


@pytest.mark.parametrize("what", ["the newest checkpoint", "the model alone"])
def test_a_run_without_lora_gives_the_weights_it_has_trained(runs, tmp_path, what):
    run = runs / "all"
    if what == "the model alone":
        shutil.rmtree(run / "checkpoints")
    merge.merge(str(run), str(tmp_path / "merged"))
    assert torch.equal(merged_logits(tmp_path / "merged"), merged_logits(run / "model"))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_an_unfinished_run_without_lora_gives_its_newest_step(runs, tmp_path):
    shutil.rmtree(runs / "all" / "model")
    first = merge.merge(str(runs / "all" / "checkpoints" / "step-000001"), str(tmp_path / "first"))
    last = merge.merge(str(runs / "all"), str(tmp_path / "last"))
    assert "step-000001" in first.source and "step-000002" in last.source
    assert " of 2" not in first.source, "the run is finished"
    assert not torch.equal(merged_logits(tmp_path / "first"), merged_logits(tmp_path / "last"))


@pytest.mark.parametrize("given", ["adapter", "adapter/checkpoints/step-000001/adapter", "all"])
def test_the_model_of_a_run_under_way_is_told_with_its_step(runs, tmp_path, given):
    run = runs / given.split("/")[0]
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")
    assert "step-000001" in (source := merge.merge(str(runs / given), str(tmp_path / "merged")).source)
    assert ", step 1 of 2" in source


def test_a_folder_of_checkpoints_and_a_run_without_one_say_what_to_give_and_what_to_wait_for(runs, tmp_path, capsys):
    def said_of(given):
        assert cli.main(["merge", str(given), "--output_dir", str(tmp_path / "merged")]) == 1
        return capsys.readouterr().err

    run = runs / "adapter"
    newest = latest_checkpoint(run)
    assert f"give {run} or its newest checkpoint, {newest}" in said_of(run / "checkpoints")
    young = runs / "young"
    (young / "checkpoints").mkdir(parents=True)
    settings = (run / "config.yaml").read_text().replace("max_steps: 2", "max_steps: 13")
    (young / "config.yaml").write_text(settings.replace("save_steps: 1", "save_steps: 5"))
    said = said_of(young)
    assert "first checkpoint after step 5" in said and f"atesd train --resume {young}" in said
    (young / "config.yaml").write_text(settings.replace("save_steps: 1", "save_steps: 50"))
    assert "first checkpoint after step 13" in said_of(young)
    (young / "summary.json").write_text("{}")
    assert "no checkpoint, no adapter/ and no model/" in said_of(young)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("run", "file"), [
    ("adapter", "adapter/adapter_model.safetensors"), ("adapter", "state.pt"), ("all", "state.pt"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(runs, tmp_path, capsys, run, file):
    newest = latest_checkpoint(runs / run)
    damage(newest / file)
    for given in (runs / run, newest):
        assert cli.main(["merge", str(given), "--output_dir", str(tmp_path / "merged")]) == 1
        said = capsys.readouterr().err
        assert f"{newest} is damaged: {file} has changed" in said
    assert not (tmp_path / "merged").exists()
    assert cli.main(["merge", str(runs / run), "--output_dir", str(tmp_path / "merged")]) == 1
    assert f"atesd merge {runs / run / 'checkpoints' / 'step-000001'}" in capsys.readouterr().err


def test_what_holds_no_trained_model_is_refused_by_name(runs, tiny_model_path, tmp_path, capsys):
    empty = runs / "empty"
    empty.mkdir()
    (runs / "all" / "lost").mkdir()
    cases = {
        tmp_path / "nowhere": "holds no trained model",
        empty: "holds no trained model",
        tiny_model_path: "nothing to merge",
        runs / "all" / "model": "nothing to merge",
    }
    for given, says in cases.items():
        assert cli.main(["merge", str(given), "--output_dir", str(tmp_path / "merged")]) == 1
        said = capsys.readouterr().err
        assert says in said and str(given) in said and "Traceback" not in said
        assert not (tmp_path / "merged").exists()


def test_an_output_folder_with_anything_in_it_is_refused_and_left_alone(runs, tmp_path, capsys):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    run = runs / "adapter"
    for given in (out, run):
        before = sorted(path.name for path in given.iterdir())
        assert cli.main(["merge", str(run), "--output_dir", str(given)]) == 2
        assert "absent or empty" in capsys.readouterr().err
        assert sorted(path.name for path in given.iterdir()) == before


@pytest.mark.parametrize("when", ["save_pretrained", "rename"])
def test_a_merge_that_fails_leaves_no_folder_and_a_full_disk_is_named(runs, tmp_path, monkeypatch, capsys, when):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = Path if when == "rename" else type(AutoTokenizer.from_pretrained(runs / "all" / "model")).__mro__[1]
    monkeypatch.setattr(owner, when, full)
    assert cli.main(["merge", str(runs / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_merge_after_a_killed_one_goes_through(runs, tmp_path):
    left = tmp_path / "merged" / model_folder.STAGING
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    merge.merge(str(runs / "adapter"), str(tmp_path / "merged"))
    assert not left.exists() and (tmp_path / "merged" / "config.json").is_file()


def test_a_base_model_that_has_changed_is_refused_unless_it_is_named(runs, tiny_model_path, tmp_path, capsys):
    moved = Path(shutil.copytree(tiny_model_path, tmp_path / "base"))
    config = (runs / "adapter" / "config.yaml").read_text().replace(str(tiny_model_path), str(moved))
    (runs / "adapter" / "config.yaml").write_text(config)
    damage(moved / "model.safetensors")
    command = ["merge", str(runs / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert cli.main(command) == 2
    assert "have changed since the run" in capsys.readouterr().err and not (tmp_path / "merged").exists()
    assert cli.main([*command, "--model", str(tiny_model_path)]) == 0


def test_rounding_to_bfloat16_is_done_once_and_told(runs, tiny_model_path, tmp_path, capsys):
    out, adapter = tmp_path / "merged", runs / "adapter" / "adapter"
    weights = {name: value / 20 for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors")  # a small update, as a low learning rate makes
    command = ["merge", str(adapter), "--output_dir", str(out), "--torch_dtype"]
    assert cli.main([*command, "bfloat16"]) == 0
    assert "Rounding to bfloat16 changed the adapter's update" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    weights = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    exact = PeftModel.from_pretrained(base.float(), str(adapter)).merge_and_unload().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], exact[name].bfloat16())
    shutil.rmtree(out)
    assert cli.main([*command, "float32"]) == 0
    assert "Rounding" not in capsys.readouterr().out


def test_an_adapter_that_cannot_be_merged_is_refused(tiny_model_path, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    settings = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(tmp_path / "alora")
    assert cli.main(["merge", str(tmp_path / "alora"), "--output_dir", str(tmp_path / "merged")]) == 1
    assert "cannot be merged" in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_the_weights_are_in_shards_of_a_size(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_SIZE", "40KB")
    merge.merge(str(runs / "adapter"), str(tmp_path / "merged"))
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    assert merged_logits(tmp_path / "merged").isfinite().all()


def test_damaged_inputs_of_a_run_are_named(runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs / "adapter", tmp_path / "run"))
    (run / "inputs.json").write_bytes(b"{")
    assert cli.main(["merge", str(run), "--output_dir", str(tmp_path / "merged")]) == 2
    assert "inputs.json cannot be read" in capsys.readouterr().err


def test_a_run_with_settings_of_an_older_version_is_merged(runs, tmp_path):
    run = Path(shutil.copytree(runs / "adapter", tmp_path / "run"))
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("save_steps", "max_steps"))]
    assert len(kept) == len(lines) - 2
    (run / "config.yaml").write_text("".join(kept))
    (run / "summary.json").unlink()
    merge.merge(str(run), str(tmp_path / "merged"))


def test_a_merge_says_nothing_while_it_writes(runs, tmp_path, capfd):
    merge.merge(str(runs / "adapter"), str(tmp_path / "merged"))
    assert capfd.readouterr().err == ""
