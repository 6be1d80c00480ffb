"""`atesd eval` on a tiny model: what it writes, what it refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from atesd import cli
from atesd.config.eval_config import LONGEST, EvalConfig, load_eval_config, short_name
from atesd.data.problems import Problem
from atesd.errors import ConfigError
from atesd.evaluation import command as evaluation
from atesd.evaluation.adapter_fit import adapter_problem
from atesd.evaluation.answers import EvalProtocol, answers, summarise
from atesd.evaluation.command import evaluate
from atesd.evaluation.files import EvalError, fingerprint
from atesd.evaluation.grading.grader import Grader
from atesd.models.loading import ModelLoadError
from atesd.reports.metrics import read_jsonl
from atesd.rollout import Rollout

pytest.importorskip("math_verify", reason="grading needs math-verify")


def samples_of(folder: Path) -> list[dict]:
    return read_jsonl(folder / "samples.jsonl")


def test_every_sample_is_written_with_what_it_takes_to_check_it(make, tiny_model_path):
    folder = evaluate(make())
    rows = samples_of(folder)
    assert len(rows) == 12 and len({(r["problem_id"], r["sample"]) for r in rows}) == 12
    for row in rows:
        assert set(row) == {
            "problem_id", "sample", "seed", "text", "extracted", "correct", "reason", "finish_reason", "num_tokens",
        }  # fmt: skip
        assert row["finish_reason"] == ("length" if row["num_tokens"] == 8 else "stop")
    results = json.loads((folder / "results.json").read_text())
    assert list(results["metrics"]) == [
        "average@4", "pass@2", "pass@4", "maj@4", "response_length", "truncated", "no_answer",
    ]  # fmt: skip
    mean = sum(r["num_tokens"] for r in rows) / 12
    assert results["metrics"]["response_length"]["value"] == pytest.approx(mean)
    written = json.loads((folder / "eval_config.json").read_text())
    assert set(written["settings"]) >= set(EvalConfig.__dataclass_fields__)
    assert written["settings"]["torch_dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert "\\boxed{}" in written["prompt"] and written["versions"]["torch"] == torch.__version__
    for name in ("results.md", "results.html"):
        text = (folder / name).read_text()
        assert "average@4" in text and "temperature" in text and "38912" not in text


def test_the_defaults_are_the_papers_protocol():
    config = load_eval_config(["--model", "m", "--data", "aime24"])
    protocol = (config.num_generations, config.max_completion_length, config.temperature, config.top_p, config.top_k)
    assert protocol == (12, None, 1.0, 1.0, 0) and LONGEST == 38912
    assert config.box_only and json.loads(config.chat_template_kwargs) == {"enable_thinking": True}
    same = load_eval_config(["--model", "m", "--data", "aime24", "--k", "3", "--max_new_tokens", "9"])
    assert (same.num_generations, same.max_completion_length) == (3, 9)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data", "aime24"], "nothing to evaluate: give --model"),
        (["--model", "m"], "nothing to evaluate on: give --data"),
        (["--model", "m", "--data", "gsm_symbolic"], "give --num_problems"),
        (["--model", "m", "--data", "d", "--k", "0"], "num_generations is 0; it must be at least 1"),
        (["--model", "m", "--data", "d", "--temperature", "0"], "temperature is 0.0"),
        (["--model", "m", "--data", "d", "--confidence", "95"], "confidence is 95"),
        (["--model", "m", "--data", "d", "--adapter", "/no/such"], "adapter is '/no/such'"),
        (["--model", "m", "--data", "d", "--chat_template_kwargs", "x"], "chat_template_kwargs is 'x'"),
        (["--model", "m", "--data", "d", "--topk", "3"], "unknown flag '--topk' .did you mean top_k"),
        (["m"], "usage: atesd eval --model"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(flags, told):
    with pytest.raises(ConfigError, match=told):
        load_eval_config(flags)


def test_a_limit_that_exceeds_the_context_is_refused_before_the_weights_load(make, monkeypatch):
    monkeypatch.setattr(evaluation, "load_student", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(
        ConfigError, match=r"max_completion_length is 38912.*2048 tokens.*give --max_new_tokens 1\d\d\d"
    ):
        evaluate(make(max_completion_length=38912))
    assert not Path(make().output_dir).exists()


def test_python_callers_may_leave_out_what_flags_may(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = evaluate(make(batch_size=None, output_dir=None))
    assert folder.parent.name == "evals"
    assert json.loads((folder / "eval_config.json").read_text())["settings"]["batch_size"] == 16


def test_an_evaluation_of_an_older_version_which_had_fewer_settings_goes_on(make):
    folder = evaluate(make())
    record = json.loads((folder / "eval_config.json").read_text())
    for name in ("rollout_kwargs", "metrics"):
        del record["settings"][name]
    (folder / "eval_config.json").write_text(json.dumps(record))
    before = (folder / "samples.jsonl").read_bytes()
    evaluate(make())
    assert (folder / "samples.jsonl").read_bytes() == before


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(make, tmp_path):
    first, again, other = (
        [
            (r["problem_id"], r["sample"], r["text"])
            for r in samples_of(evaluate(make(output_dir=str(tmp_path / n), seed=s)))
        ]
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other
    assert len({text for _, _, text in first}) > 6  # samples of one problem differ


def test_a_sample_does_not_depend_on_how_many_others_there_are(make, tmp_path):
    def texts(**changes):
        rows = samples_of(evaluate(make(output_dir=str(tmp_path / str(changes)), **changes)))
        return {(r["problem_id"], r["sample"]): r["text"] for r in rows}

    whole = texts()
    for fewer in (texts(num_generations=2), texts(num_problems=2), texts(batch_size=1)):
        assert fewer.items() <= whole.items()


def test_an_evaluation_killed_at_any_moment_ends_with_the_samples_of_one_that_was_not(
    make, tmp_path, capsys, start_atesd, kill_when
):
    long = {"max_completion_length": 400, "num_problems": 6, "num_generations": 4, "batch_size": 3}
    names = "model_name_or_path dataset_name num_problems num_generations max_completion_length batch_size "
    names += "num_bootstrap output_dir"
    config = make(output_dir=str(tmp_path / "broken"), **long)
    flags = [word for name in names.split() for word in (f"--{name}", str(getattr(config, name)))]
    file = tmp_path / "broken" / "samples.jsonl"
    kill_when(start_atesd("eval", *flags), lambda: file.exists() and file.read_bytes().count(b"\n") >= 4)
    before = file.read_bytes()
    assert 4 <= before.count(b"\n") < 24
    file.write_bytes(before[:-20])  # a line cut off by the kill
    assert cli.main(["eval", *flags]) == 0
    assert "average@4" in capsys.readouterr().out
    whole = evaluate(make(output_dir=str(tmp_path / "whole"), **long))
    assert sorted(file.read_text().splitlines()) == sorted((whole / "samples.jsonl").read_text().splitlines())
    assert (tmp_path / "broken" / "results.json").read_text() == (whole / "results.json").read_text()


def test_only_what_is_missing_of_a_batch_is_kept_and_nothing_is_written_twice(make):
    folder = evaluate(make())
    whole = (folder / "samples.jsonl").read_text().splitlines()
    kept = [line for i, line in enumerate(whole) if i not in (1, 6, 7)]
    (folder / "samples.jsonl").write_text("".join(line + "\n" for line in kept) + whole[1][:40])
    (folder / "results.json").unlink()
    evaluate(make())
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert lines == kept + [whole[1], whole[6], whole[7]]


class Scripted:
    """An engine that answers from a script: {prompt: [response token ids, ...]}, one after the other."""

    def __init__(self, script):
        self.script = {key: list(value) for key, value in script.items()}

    def generate(self, prompts, sampling=None):
        assert len(prompts) == len(sampling.seeds) == len(set(sampling.seeds))
        replies = [self.script[tuple(prompt)].pop(0) for prompt in prompts]
        return [Rollout(p, list(ids), truncated, True) for p, (ids, truncated) in zip(prompts, replies, strict=True)]


class Letters:
    """A tokenizer whose tokens are characters."""

    all_special_ids, all_special_tokens = (), ()

    @staticmethod
    def decode(ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


def test_every_metric_is_the_one_counted_by_hand():
    problems = [Problem("a", "", "", "7"), Problem("b", "", "", r"\frac{1}{2}")]
    said = {
        (1,): [r"\boxed{7}", r"\boxed{8}", r"\boxed{8.0}", "seven is 7"],
        (2,): [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{\sqrt{2}}", r"\boxed{"],
    }
    script = {
        prompt: [([ord(c) for c in text], text == "\\boxed{") for text in texts] for prompt, texts in said.items()
    }
    protocol = EvalProtocol(k=4, max_completion_length=99, temperature=1.0, top_p=1.0, top_k=0, seed=0, batch_size=3)
    with Grader(num_workers=1, box_only=True) as grader:
        rows = [
            row
            for batch in answers(problems, [[1], [2]], Scripted(script), Letters(), grader, protocol)
            for row in batch
        ]
        found = summarise(rows, 4, grader, 0.95, 200)
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert value["average@4"] == (1 / 4 + 2 / 4) / 2
    assert value["pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert value["pass@4"] == 1.0
    assert value["maj@4"] == 0.5  # 8 and 8.0 are one vote and win; one half, however written, wins
    assert value["no_answer"] == (1 / 4 + 1 / 4) / 2
    assert value["truncated"] == 1 / 8
    assert value["response_length"] == sum(len(t) for texts in said.values() for t in texts) / 8


def test_wrong_answers_that_are_equal_are_one_vote():
    def sample(name, i, extracted, correct):
        base = {"problem_id": name, "sample": i, "reason": "", "num_tokens": 1, "finish_reason": "stop"}
        return {**base, "extracted": extracted, "correct": correct}

    written = [r"\frac{1}{2}", "0.5", r"\frac{2}{4}", "7", "7", r"x+1", r"1+x"]
    rows = [sample("p", i, text, text == "7") for i, text in enumerate(written)]
    with Grader(num_workers=1) as grader:
        assert summarise(rows, 7, grader, 0.95, 50)["metrics"]["maj@7"]["value"] == 0.0  # three halves beat two sevens
        rows[2] = sample("p", 2, "9", False)
        assert summarise(rows, 7, grader, 0.95, 50)["metrics"]["maj@7"]["value"] == pytest.approx(1 / 3)


def test_a_run_s_adapter_is_found_and_changes_the_samples(make, tiny_config, tmp_path, tiny_model_path):
    from atesd.trainer import train

    run = train(tiny_config(max_steps=2, num_train_problems=8, learning_rate=0.5, max_grad_norm=10.0))
    plain = evaluate(make(output_dir=str(tmp_path / "plain")))
    adapted = {}
    for name, path in {"run": run, "checkpoint": run / "checkpoints/step-000002", "adapter": run / "adapter"}.items():
        folder = evaluate(make(model_name_or_path=None, adapter=str(path), output_dir=str(tmp_path / f"by-{name}")))
        adapted[name] = [row["text"] for row in samples_of(folder)]
    assert adapted["run"] == adapted["checkpoint"] == adapted["adapter"]
    assert adapted["run"] != [row["text"] for row in samples_of(plain)]
    seen = json.loads((tmp_path / "by-run/results.json").read_text())["seen_in_training"]
    assert seen and set(seen) < {row["problem_id"] for row in samples_of(plain)} | set(seen)
    assert "were trained on" in (tmp_path / "by-run/results.html").read_text()
    with pytest.raises(EvalError, match=r"holds no adapter_config.json"):
        evaluate(make(adapter=str(tmp_path), output_dir=str(tmp_path / "none")))
    with pytest.raises(EvalError, match=rf"a whole model and no adapter: give --model {tiny_model_path} instead"):
        evaluate(make(adapter=str(tiny_model_path), output_dir=str(tmp_path / "none")))
    weights = run / "checkpoints/step-000002/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for damaged in (run / "checkpoints/step-000002", run / "checkpoints/step-000002/adapter"):
        with pytest.raises(EvalError, match=r"step-000002 is damaged: adapter/adapter_model.safetensors has changed"):
            evaluate(make(model_name_or_path=None, adapter=str(damaged), output_dir=str(tmp_path / "damaged")))
    assert not (tmp_path / "damaged").exists()


def test_a_run_without_lora_is_evaluated_from_its_model_folder(make, tiny_config, tmp_path):
    from atesd.trainer import train

    run = train(tiny_config(max_steps=1, use_peft=False))
    evaluate(make(model_name_or_path=str(run / "model"), output_dir=str(tmp_path / "full")))
    with pytest.raises(EvalError, match=r"a run without LoRA: give --model .*model instead"):
        evaluate(make(adapter=str(run), output_dir=str(tmp_path / "none")))


def adapter_of(config, folder, **settings):
    """An adapter for a random model of `config`, in `folder`."""
    base = AutoModelForCausalLM.from_config(config)
    get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": "all-linear", **settings})).save_pretrained(folder)
    return str(folder)


OTHERS = {
    "other widths": ({"hidden_size": 48, "intermediate_size": 96}, r"is \(2, \d+\), where the model needs \(2, \d+\)"),
    "more layers": ({"num_hidden_layers": 3}, r"the model has no place for its 'model\.layers\.2\."),
    "fewer layers": ({"num_hidden_layers": 1}, r"it has no weights for the model's 'model\.layers\.1\."),
}


@pytest.mark.parametrize("other", [*OTHERS, "other modules"])
def test_an_adapter_of_another_model_is_refused_before_weights_are_loaded(
    make, tmp_path, tiny_model_path, monkeypatch, other
):
    monkeypatch.setattr(evaluation, "load_student", lambda *_: pytest.fail("the weights were loaded"))
    if other in OTHERS:
        changes, problem = OTHERS[other]
        config = AutoConfig.from_pretrained(tiny_model_path)
        config.update({**changes, "layer_types": None})
        folder = adapter_of(config, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    else:
        problem = "Target modules .* not found"
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
        folder = adapter_of(config, tmp_path / "adapter", target_modules=["c_attn"])
    with pytest.raises(ModelLoadError, match=rf"does not fit the model.*{problem}"):
        evaluate(make(adapter=folder))
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["norm"]}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]},
     {"init_lora_weights": "pissa"}, {"trainable_token_indices": [5, 6]}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_an_adapter_of_the_model_fits_whatever_its_kind(tmp_path, tiny_model_path, settings):
    config = AutoConfig.from_pretrained(tiny_model_path)
    adapter = adapter_of(config, tmp_path / "adapter", **settings)
    assert adapter_problem(config, Path(adapter)) is None


def test_an_adapter_with_stored_embeddings_fits_and_one_that_torch_cannot_lay_out_is_left_to_the_loading(
    tmp_path, tiny_model_path
):
    config = AutoConfig.from_pretrained(tiny_model_path)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert adapter_problem(config, tmp_path / "a") is None
    shira = ShiraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(AutoModelForCausalLM.from_config(config), shira).save_pretrained(tmp_path / "b")
    assert adapter_problem(config, tmp_path / "b") is None


def test_a_fingerprint_sees_one_changed_bit_of_a_small_file_and_an_update_of_a_large_one(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    first = fingerprint(tmp_path)
    file.write_bytes(bytes(999) + b"\x01")
    assert fingerprint(tmp_path) != first
    large = torch.zeros(3_000_000)
    file.write_bytes(large.numpy().tobytes())
    before = fingerprint(tmp_path)
    file.write_bytes((large + 1e-6).numpy().tobytes())
    assert fingerprint(tmp_path) != before
    assert fingerprint("org/name") is None


def test_names_of_folders_tell_runs_and_checkpoints_apart():
    names = {
        "runs/mine": "mine",
        "runs/mine/adapter": "mine",
        "runs/mine/checkpoints/step-000010": "mine-step-000010",
        "Qwen/Qwen3-1.7B": "Qwen3-1.7B",
        "data/hard.jsonl": "hard",
    }
    assert {path: short_name(path) for path in names} == names


def test_the_resolved_settings_read_back_as_the_ones_that_were_used(make):
    config = make(num_generations=2)
    folder = evaluate(config)
    written = json.loads((folder / "eval_config.json").read_text())["settings"]
    assert EvalConfig(**written) == replace(config, torch_dtype=written["torch_dtype"])
