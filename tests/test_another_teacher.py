"""Runs whose teacher is another model: larger, with a padded head, read from its own folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atesd.config import load_config
from atesd.errors import ConfigError
from atesd.models.loading import ModelLoadError
from atesd.rollout.seeds import ResponseSeeds
from atesd.run import Run
from atesd.studies.held_out import measure
from atesd.trainer import Trainer, train
from tests.run_logs import steady_rows_of

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config(tiny_config, other_model_path):
    def make(**changes):
        settings = {"teacher": "model", "teacher_model_name_or_path": str(other_model_path), "entry_clip": None}
        return tiny_config(**{**settings, **changes})

    return make


@pytest.fixture
def padded_student(tiny_model_path, tmp_path) -> str:
    """A tiny student whose head has more rows than the teacher's, all of them likelier than a token's."""
    settings = LlamaConfig.from_pretrained(tiny_model_path)
    settings.update({"vocab_size": 330, "tie_word_embeddings": False})
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings)
    model.lm_head.weight.data[300:] *= 40
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "padded")
    return str(tmp_path / "padded")


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_goes_on_to_the_metrics_of_the_run_that_was_not(
    config, tmp_path, other_model_path, monkeypatch
):
    train(config(max_steps=4, output_dir=str(tmp_path / "whole")))
    part, step = tmp_path / "part", Trainer.train_step

    def stopped(self, t):
        if t == 2:
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config(max_steps=4, output_dir=str(part)))
    monkeypatch.setattr(Trainer, "train_step", step)
    train(load_config(None, ["--resume", str(part), "--teacher_device", "cpu"]))
    assert steady_rows_of(part) == steady_rows_of(tmp_path / "whole")
    for row in steady_rows_of(part):
        assert row["mismatch"] > 0 and row["grounded_score"] < 0 and row["skipped"] == 0
    digests = json.loads((part / "inputs.json").read_text())["digests"]
    assert digests["the teacher's files"] and digests["the teacher's files"] != digests["the base model's files"]
    checkpoint = sum(p.stat().st_size for p in (part / "checkpoints").rglob("*") if p.is_file()) / 2
    weights = (other_model_path / "model.safetensors").stat().st_size
    assert checkpoint < weights, "no weight of the teacher is saved"


@pytest.mark.filterwarnings("ignore")
def test_a_run_does_not_go_on_with_a_teacher_whose_files_have_changed(config, tmp_path, other_model_path):
    teacher = shutil.copytree(other_model_path, tmp_path / "teacher")
    run_dir = train(config(max_steps=1, teacher_model_name_or_path=str(teacher)))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(teacher)
    flags = ["--resume", str(run_dir), "--max_steps", "2"]
    with pytest.raises(ConfigError, match="has read other inputs: the teacher's files changed since"):
        train(load_config(None, flags))
    train(load_config(None, [*flags, "--allow_changed_inputs"]))
    assert json.loads((run_dir / "summary.json").read_text())["changed_inputs"] == ["the teacher's files"]
    with pytest.raises(ConfigError, match=r"teacher_model_name_or_path is .* was started with"):
        load_config(None, [*flags, "--teacher_model_name_or_path", str(other_model_path)])


@pytest.mark.filterwarnings("ignore")
def test_the_model_itself_as_another_model_gives_what_the_frozen_teacher_gives(tiny_config, tiny_model_path, tmp_path):
    """Its logits come from a head of its own, so the numbers agree to rounding."""
    common = {"max_steps": 2, "entry_clip": None}
    other = {"teacher": "model", "teacher_model_name_or_path": str(tiny_model_path), "teacher_weights": "float32"}
    frozen = steady_rows_of(train(tiny_config(**common, output_dir=str(tmp_path / "frozen"))))
    for ours, theirs in zip(steady_rows_of(train(tiny_config(**common, **other))), frozen, strict=True):
        for name in ("loss", "mismatch", "grounded_score", "teacher_entropy", "top1_agreement", "probe_nll", "alpha"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [
    {"use_peft": False, "bf16": True},
    {"objective": "distill+grpo", "num_generations": 2},
    {"per_example_exposure": True, "reference_source": "other_problem", "exposure_order": "random"},
    {"exposure_policy": "full", "reference_source": "none"},
    {"divergence": "jsd", "loss_aggregation": "sequence", "exposure_policy": "linear"},
], ids=["all weights", "with rewards", "views", "nothing read", "another loss"])  # fmt: skip
def test_losses_policies_and_what_the_teacher_reads_work_as_with_the_model_itself(config, changes):
    trainer = Trainer(Run.build(config(**changes)))
    before = {name: p.clone() for name, p in trainer.run.teacher.model.named_parameters()}
    metrics, _ = trainer.train_step(0)
    assert metrics["grad_norm"] > 0 and metrics["mismatch"] > 0.001
    assert all(torch.equal(p, before[name]) for name, p in trainer.run.teacher.model.named_parameters())


@pytest.mark.filterwarnings("error:no signal")
def test_another_model_teaches_even_where_it_reads_what_the_student_reads(config):
    same = {"student_chat_template_kwargs": "{}", "teacher_chat_template_kwargs": "{}"}
    run = Run.build(config(exposure_policy="full", reference_source="none", **same))
    assert not run.data.no_signal()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_peft", [True, False])
def test_entries_that_only_pad_a_head_are_neither_sampled_nor_learned(config, padded_student, use_peft):
    settings = config(model_name_or_path=padded_student, use_peft=use_peft, temperature=2.0, top_p=1.0, top_k=0)
    trainer = Trainer(Run.build(settings))
    run = trainer.run
    assert run.student.head.weight.shape[0] == 330 and run.teacher.head.weight.shape[0] == 320
    seen = []
    generate = run.rollout.engine.generate
    run.rollout.engine.generate = lambda *args: seen.extend(generate(*args)) or seen
    metrics, _ = trainer.train_step(0)
    assert max(i for rollout in seen for i in rollout.response_ids) < 300
    assert metrics["skipped"] == 0 and metrics["mismatch"] > 0
    held_out = measure(run, run.data.problems.probe, 1.0, graded=False)
    assert all(0 < each.mismatch < 100 for each in held_out)
    run.rollout.engine.entries, run.rollout.engine.seeds = None, ResponseSeeds(0)
    prompts = [run.data.prompts.student(problem) for problem in run.data.problems.train[:4]]
    assert max(i for rollout in generate(prompts) for i in rollout.response_ids) >= 300, "the case is a real one"


@pytest.mark.filterwarnings("ignore")
def test_a_start_with_a_teacher_of_another_vocabulary_is_refused_and_leaves_no_folder(
    config, other_model_path, tmp_path, monkeypatch
):
    teacher = shutil.copytree(other_model_path, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(teacher)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelLoadError, match=r"'<\|tool\|>' is token 300 of the teacher and no token of the student"):
        train(config(teacher_model_name_or_path=str(teacher)))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_problem_that_does_not_fit_the_teachers_context_is_refused_by_name(config, other_model_path, tmp_path):
    teacher = shutil.copytree(other_model_path, tmp_path / "teacher")
    path = teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 100}))
    short = str(teacher)
    with pytest.raises(
        ValueError, match=r"the teacher prompt at alpha=.* of problem .* the context of 100 tokens less"
    ):
        train(config(teacher_model_name_or_path=short))
    with pytest.raises(ValueError, match="no room for a prompt in the teacher's context of 100 tokens"):
        train(config(teacher_model_name_or_path=short, max_completion_length=100))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_of_4_bits_makes_a_step(config, bf16):
    pytest.importorskip("bitsandbytes")
    metrics, _ = Trainer(Run.build(config(teacher_weights="4bit", bf16=bf16))).train_step(0)
    assert metrics["grad_norm"] > 0 and metrics["mismatch"] > 0
