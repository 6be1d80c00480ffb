"""Runs whose teacher is behind a server: what they learn, and that its failure costs a run nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.config import load_config
from atesd.errors import ConfigError, ModelError
from atesd.models.loading import ModelLoadError
from atesd.rollout import RolloutError
from atesd.run import Run
from atesd.studies.held_out import measure
from atesd.trainer import Trainer, train
from tests.run_logs import steady_rows_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_report")]
ROWS = 320  # of the other model's head


@pytest.fixture
def teacher(serve, other_model_path):
    return serve(other_model_path)


@pytest.fixture
def config(tiny_config, teacher):
    def make(**changes):
        settings = {"teacher": "vllm_server", "teacher_base_url": teacher.url, "scoring_temperature": 1.0}
        return tiny_config(**{**settings, **changes})

    return make


@pytest.mark.parametrize("changes", [
    {},
    {"entry_clip": None, "divergence": "jsd", "loss_aggregation": "sequence"},
    {"objective": "policy_gradient"},
], ids=["clipped forward KL", "jsd", "policy gradient"])  # fmt: skip
def test_with_all_of_the_vocabulary_a_run_is_that_of_the_model_itself(
    config, tiny_config, other_model_path, tmp_path, changes
):
    """The head's padding rows are in the server's answers, and count on neither side."""
    common = {"max_steps": 2, **changes}
    local = {"teacher": "model", "teacher_model_name_or_path": str(other_model_path), "teacher_weights": "float32"}
    ours = steady_rows_of(train(config(**common, teacher_top_k=ROWS)))
    theirs = steady_rows_of(
        train(tiny_config(**common, **local, scoring_temperature=1.0, output_dir=str(tmp_path / "l")))
    )
    names = {"loss", "mismatch", "grounded_score", "teacher_entropy", "probe_nll", "alpha", "grad_norm"}
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
        assert row.get("top1_agreement") == other.get("top1_agreement")


def test_fewer_entries_give_a_lower_bound_of_the_loss_that_rises_with_their_number(config, tmp_path):
    found = {}
    for top in (1, 64, ROWS):
        settings = config(
            teacher_top_k=top, entry_clip=None, exposure_policy="full", output_dir=str(tmp_path / str(top))
        )
        metrics, _ = Trainer(Run.build(settings)).train_step(0)
        found[top] = metrics["mismatch"]
        assert metrics["grad_norm"] > 0
    assert 0 < found[1] < found[64] < found[ROWS]


@pytest.mark.parametrize("changes", [
    {"use_peft": False, "bf16": True},
    {"objective": "distill+grpo", "num_generations": 2},
    {"objective": "distill+sft", "position_halflife": 4.0},
    {"objective": "policy_gradient", "teacher_top_k": 1},
    {"per_example_exposure": True, "reference_source": "other_problem"},
    {"teacher_views": '{"answer_only": 1}', "exposure_policy": "full", "grounding": "none"},
    {"teacher_tail": "renormalise", "scoring_temperature": 1.1},
], ids=["all weights", "rewards", "imitation", "one number", "another reference", "a view", "tail"])  # fmt: skip
def test_losses_policies_and_what_the_teacher_reads_work_as_with_a_model_here(config, changes):
    metrics, _ = Trainer(Run.build(config(**changes))).train_step(0)
    assert metrics["grad_norm"] > 0 and metrics["mismatch"] != 0 and metrics["teacher_entropy"] > 0
    assert metrics["skipped"] == 0 and ("grounded_score" not in metrics) == (changes.get("grounding") == "none")


def test_a_steps_responses_are_scored_in_one_request_each_all_of_them_before_the_students_forward(
    config, teacher, monkeypatch
):
    trainer = Trainer(Run.build(config(grounding="none", num_probe_problems=0, exposure_policy="full")))
    before = len(teacher.seen)
    forward, at_forward = trainer.run.student.backbone, []

    def counting(**inputs):
        at_forward.append(len(teacher.seen) - before)
        return forward(**inputs)

    monkeypatch.setattr(trainer.run.student, "backbone", counting)
    trainer.train_step(0)
    asked = teacher.seen[before:]
    assert at_forward == [4, 4] and len(asked) == 4, "two micro-batches of two"
    assert all(body["max_tokens"] == 1 and body["prompt_logprobs"] == 64 for body in asked)


def test_held_out_problems_are_measured_against_the_server(config):
    run = Run.build(config())
    found = measure(run, run.data.problems.probe, 1.0, graded=False)
    assert all(each.mismatch > 0 and 0 <= each.top1_disagreement <= 1 for each in found)


def test_a_run_whose_server_fails_is_saved_as_before_the_step_and_goes_on_elsewhere_as_if_nothing_had_happened(
    config, serve, teacher, other_model_path, tmp_path
):
    settings = {"max_steps": 4, "save_steps": 10, "hold_window": 2}
    whole = train(config(**settings, output_dir=str(tmp_path / "whole")))
    part = tmp_path / "part"
    start = len(teacher.seen)
    per_step = (start - 1) // 4  # the first request is that of the start
    for broken_at in (2 * per_step + 1, 2 * per_step + 4):  # within the score of references, and among the responses
        teacher.failing = lambda count, last=start + 1 + broken_at: count >= last
        shutil.rmtree(part, ignore_errors=True)
        with pytest.raises(
            RolloutError, match=r"teacher scores failed 3 times[^\n]*503[^\n]*\n.*as it was after step 2"
        ):
            train(config(**settings, output_dir=str(part)))
        teacher.failing, start = lambda count: False, len(teacher.seen)
    elsewhere = serve(other_model_path)
    train(load_config(None, ["--resume", str(part), "--teacher_base_url", elsewhere.url]))
    assert steady_rows_of(part) == steady_rows_of(whole) and len(elsewhere.seen) > 1


def test_another_model_at_the_address_is_named_when_a_run_goes_on(config, serve, tiny_model_path, tmp_path):
    run_dir = train(config(max_steps=1))
    flags = ["--resume", str(run_dir), "--max_steps", "2", "--teacher_base_url", serve(tiny_model_path, "other").url]
    with pytest.raises(ConfigError, match="has read other inputs: the model at teacher_base_url changed since"):
        train(load_config(None, flags))
    train(load_config(None, [*flags, "--allow_changed_inputs"]))
    assert len(steady_rows_of(run_dir)) == 2


@pytest.fixture
def loads_nothing(monkeypatch):
    monkeypatch.setattr("atesd.run_parts.load_model", lambda *_: pytest.fail("loaded"))


@pytest.mark.usefixtures("loads_nothing")
def test_a_server_that_gives_fewer_log_probs_is_refused_with_what_to_do(config, teacher, tmp_path):
    teacher.max_logprobs = 20
    with pytest.raises(
        RolloutError, match=r"64, which is greater than max allowed: 20(.|\n)*--max-logprobs 64 or more"
    ):
        train(config())
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("loads_nothing")
def test_prompts_that_do_not_fit_the_servers_context_are_refused_by_name(config, teacher):
    teacher.context = 100
    with pytest.raises(ValueError, match=r"the teacher prompt at alpha=.* of problem .* the context of 99 tokens less"):
        train(config())


@pytest.mark.usefixtures("loads_nothing")
def test_a_server_of_another_vocabulary_is_refused_with_the_token_that_differs(
    config, serve, other_model_path, tmp_path
):
    folder = shutil.copytree(other_model_path, tmp_path / "teacher")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(content))
    url = serve(folder).url
    number = min(ids["a"], ids["b"])
    with pytest.raises(ModelError, match=f"holds 'teacher', .* token {number} is '[ab]' of the teacher and '[ab]' of"):
        train(config(teacher_base_url=url))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("loads_nothing")
def test_the_tokenizer_that_the_settings_name_is_compared_in_place_of_the_servers_texts(
    config, teacher, other_model_path, tmp_path
):
    folder = shutil.copytree(other_model_path, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"'<\|tool\|>' is token 300 of the teacher and no token of the student"):
        train(config(teacher_model_name_or_path=str(folder)))
    assert teacher.seen == []


def test_a_server_that_gives_no_texts_is_used_and_a_line_says_what_was_not_checked(config, teacher, capfd):
    teacher.detokenizes = False
    Run.build(config())
    assert "not checked whether the teacher at http" in capfd.readouterr().out


@pytest.mark.filterwarnings("error:no signal")
def test_another_model_teaches_even_where_it_reads_what_the_student_reads(config):
    same = {"student_chat_template_kwargs": "{}", "teacher_chat_template_kwargs": "{}"}
    run = Run.build(config(exposure_policy="full", reference_source="none", **same))
    assert not run.data.no_signal()


def test_entries_that_only_pad_the_students_head_are_not_learned(config, tiny_model_path, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig.from_pretrained(tiny_model_path)
    settings.update({"vocab_size": 330, "tie_word_embeddings": False})
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings)
    model.lm_head.weight.data[300:] *= 40
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "padded")
    padded = config(model_name_or_path=str(tmp_path / "padded"), use_peft=False, entry_clip=None)
    trainer = Trainer(Run.build(padded))
    metrics, _ = trainer.train_step(0)
    assert 0 < metrics["mismatch"] < 20, "rows that no token has would take all of the probability"
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").lm_head.weight
    after = trainer.run.student.head.weight
    assert torch.equal(before[300:], after[300:]) and not torch.equal(before[:300], after[:300])
