"""The dry run, the memory plan against bytes that are really there, the presets, and problems that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoTokenizer

from atesd import cli
from atesd.config import load_config, recipes
from atesd.data.run_data import load_run_data
from atesd.models.batching import hidden_rows, pack
from atesd.models.loading import ModelLoadError, context_length, load_tokenizer
from atesd.models.recompute import is_kept
from atesd.planning.dry_run import dry_run, longest_reference, prompt_lengths
from atesd.planning.memory_plan import GIB, Layout, plan_memory, teacher_model_bytes
from atesd.planning.model_shape import model_shape, teacher_shape
from atesd.planning.scaling import MODELS
from atesd.planning.time_plan import plan_products
from atesd.run import Run
from atesd.trainer import Trainer, train

PARAMETERS = {"1.7b": 1_720_574_976, "4b": 4_022_468_096, "8b": 8_190_735_360}  # of the models' cards
GLOBAL_BATCH = {"1.7b": 64, "4b": 32, "8b": 32}


def without_weights(folder: Path, tokenizer_from: Path, config) -> str:
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("method", ["opsd", "atesd"])
def test_a_preset_plans_the_published_batch_within_80_gb_without_weights(
    method, size, tiny_model_path, sums, tmp_path, capsys
):
    config = MODELS[f"Qwen3-{size.upper()}"]()
    model = without_weights(tmp_path / "model", tiny_model_path, config)
    flags = ["--model_name_or_path", model, "--dataset_name", str(sums), "--num_probe_problems", "2"]
    assert cli.main(["train", f"{method}-qwen3-{size}", *flags, "--dry-run", "--output_dir", str(tmp_path / "r")]) == 0
    text = capsys.readouterr().out
    assert f"{PARAMETERS[size]:,} parameters" in text
    preset = load_config(f"{method}-qwen3-{size}", flags)
    assert plan_memory(model_shape(config, preset), preset, 2048).total < 80e9
    assert preset.per_device_train_batch_size * preset.gradient_accumulation_steps == GLOBAL_BATCH[size]
    assert preset.gradient_accumulation_steps % 8 == 0, "eight GPUs must be able to share a step"
    assert not (tmp_path / "r").exists(), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("query_key_value", "has no 'query_key_value'; its linear layers are: down_proj, gate_proj"),
        ("q_proj,fc1", "has no 'fc1'"),
        ("q_proj,norm", "lora_target_modules is 'q_proj,norm': .*not supported"),
    ],
    ids=["of another family", "one of two", "no linear layer"],
)
def test_a_dry_run_refuses_an_adapter_that_does_not_fit_the_model(tiny_config, targets, says):
    with pytest.raises(ModelLoadError, match=says):
        dry_run(tiny_config(lora_target_modules=targets))
    dry_run(tiny_config(lora_target_modules=targets, use_peft=False))


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_presets_are_the_published_base_recipe(size):
    for method in ("opsd", "atesd"):
        config = load_config(f"{method}-qwen3-{size}", [])
        assert config.model_name_or_path.lower() == f"qwen/qwen3-{size}"
        assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (64, 128, "all-linear")
        assert (config.teacher, config.divergence, config.learning_rate) == ("frozen", "forward_kl", 5e-6)
        assert (config.max_grad_norm, config.max_completion_length) == (0.1, 1024)
        assert (config.lr_scheduler_type, config.max_steps) == ("linear", 100)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        assert batch == (64 if size == "1.7b" else 32)
        assert (config.temperature, config.top_p, config.top_k, config.scoring_temperature) == (1.1, 0.95, 20, 1.1)
        assert config.entry_clip == (0.06 if size == "8b" else 0.05)
        assert json.loads(config.student_chat_template_kwargs) == {"enable_thinking": False}
        assert json.loads(config.teacher_chat_template_kwargs) == {"enable_thinking": True}
        assert config.exposure_policy == ("full" if method == "opsd" else "atesd")
        text = recipes()[f"{method}-qwen3-{size}"].read_text()
        assert f"--num_processes 8 -m atesd train {method}-qwen3-{size} --gradient_accumulation_steps 1" in text


def test_a_dry_run_shows_the_prompts_and_loads_no_weights(tiny_config, tiny_model_path, tmp_path, monkeypatch):
    folder = without_weights(tmp_path / "bare", tiny_model_path, AutoConfig.from_pretrained(tiny_model_path))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    text = str(dry_run(tiny_config(model_name_or_path=folder)))
    assert "student (" in text and "teacher, alpha = 0.5" in text and "First she has" in text
    assert re.search(r"^  problems_used +14$", text, re.MULTILINE)
    assert "loss chunk" in text and "KV cache" in text and "activations" in text
    with pytest.raises(ValueError, match="student prompt of problem"):
        dry_run(tiny_config(model_name_or_path=folder, max_prompt_length=8))


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"exposure_policy": "full"}, "1"),
        ({"exposure_policy": "fixed", "fixed_alpha": 0.34}, "0.34"),
        ({"exposure_policy": "random", "alpha_min": 0.6}, "0.8"),
    ],
)
def test_a_dry_run_shows_the_teacher_at_an_exposure_of_the_run(tiny_config, settings, shown):
    text = str(dry_run(tiny_config(**settings)))
    assert text.count("teacher, alpha = ") == text.count(f"teacher, alpha = {shown} (") == 2


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"torch_dtype": "bfloat16", "bf16": True},
        {"use_peft": False},
        {"use_peft": False, "bf16": True, "teacher": "ema"},
        {"lora_target_modules": "q_proj,v_proj", "teacher": "ema"},
    ],
)
def test_planned_weights_gradients_and_optimizer_are_those_of_a_real_step(tiny_config, tiny_model_path, settings):
    config = tiny_config(**settings)
    plan = plan_memory(model_shape(AutoConfig.from_pretrained(tiny_model_path), config), config, 100, "cpu")
    trainer = Trainer(Run.build(config))
    gradients = []
    student = trainer.run.student
    step = student.optimizer.step
    trainer.run.student.optimizer.step = lambda: (
        gradients.append(bytes_of(p.grad for p in trainer.run.student.trained.values())) or step()
    )
    trainer.train_step(0)
    moments = [
        v for state in trainer.run.student.optimizer.state.values() for v in (state["exp_avg"], state["exp_avg_sq"])
    ]
    assert plan.weights == bytes_of(trainer.run.student.model.parameters())
    assert plan.gradients == gradients[0]
    assert plan.optimizer == bytes_of(moments)
    assert plan.teacher == bytes_of(trainer.run.teacher.values.values())


def with_other_teacher(tiny_config, other_model_path, **settings):
    return tiny_config(teacher="model", teacher_model_name_or_path=str(other_model_path), **settings)


@pytest.mark.parametrize("settings", [
    {}, {"bf16": True}, {"teacher_weights": "float32"}, {"bf16": True, "use_peft": False}, {"teacher_device": "cpu"},
])  # fmt: skip
def test_the_plan_counts_another_models_weights_and_the_copy_of_its_head_that_the_loss_reads(
    tiny_config, tiny_model_path, other_model_path, settings
):
    config = with_other_teacher(tiny_config, other_model_path, **settings)
    shape, teacher = model_shape(AutoConfig.from_pretrained(tiny_model_path), config), teacher_shape(config)
    plan = plan_memory(shape, config, 100, "cpu", teacher=teacher)
    found = Run.build(config).teacher
    own, read = found.model.get_output_embeddings().weight, found.head.weight
    copied = config.teacher_device or read.data_ptr() != own.data_ptr()
    assert teacher_model_bytes(teacher, config) == bytes_of(found.model.parameters())
    there = 0 if config.teacher_device else bytes_of(found.model.parameters())
    # the plan counts the rows of padding too, which the loss does not read
    assert plan.teacher == there + bool(copied) * own.numel() * read.element_size()
    frozen = plan_memory(
        shape, tiny_config(**{k: v for k, v in settings.items() if k in ("bf16", "use_peft")}), 100, "cpu"
    )
    assert plan.hidden_states == frozen.hidden_states // (4 * 32) * (2 * 32 + 48)


def test_weights_of_4_bits_are_planned_for_the_matrices_alone(tiny_config, other_model_path):
    config = with_other_teacher(tiny_config, other_model_path, teacher_weights="4bit")
    teacher = teacher_shape(config)
    others = 2 * (teacher.parameters - teacher.matrices)
    assert 0.5 < (teacher_model_bytes(teacher, config) - others) / teacher.matrices < 0.52


def test_a_dry_run_names_the_other_teacher_and_where_it_is(tiny_config, other_model_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    said = dry_run(with_other_teacher(tiny_config, other_model_path, teacher_device="cuda:1"))
    parameters = teacher_shape(with_other_teacher(tiny_config, other_model_path)).parameters
    text = " ".join(str(said).split())
    assert f"teacher {other_model_path}, {parameters:,} parameters in bfloat16, 0.00 GiB on cuda:1" in text
    assert "only what the loss reads: the model is on cuda:1" in text
    assert said.data["teacher"]["parameters"] == parameters and said.data["teacher"]["bytes"] == 2 * parameters
    text = " ".join(str(dry_run(with_other_teacher(tiny_config, other_model_path))).split())
    assert "another model, with what the loss reads of its head" in text


def test_a_dry_run_refuses_another_teacher_as_the_run_would(tiny_config, other_model_path, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(ModelLoadError, match=r"teacher_model_name_or_path is .*, a folder without config.json"):
        dry_run(with_other_teacher(tiny_config, bare))
    folder = without_weights(tmp_path / "short", other_model_path, AutoConfig.from_pretrained(other_model_path))
    config = json.loads((tmp_path / "short" / "config.json").read_text()) | {"max_position_embeddings": 100}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the teacher prompt .* the context of 100 tokens less"):
        dry_run(with_other_teacher(tiny_config, folder))


class Products(TorchDispatchMode):
    """Bytes of what the operators that `selective` keeps return while it is on."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if is_kept(function, *args):
            first = out[0] if isinstance(out, tuple) else out
            self.sizes[first.untyped_storage().data_ptr()] = first.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("mode", [None, "full", "selective"])
def test_planned_activations_are_about_what_autograd_keeps(tiny_config, tiny_model_path, mode):
    """An estimate, so a loose bound: a wrong factor of 1.5 would be noticed."""
    settings = {} if mode is None else {"gradient_checkpointing": True, "gradient_checkpointing_mode": mode}
    config = tiny_config(max_completion_length=64, **settings)
    shape = model_shape(AutoConfig.from_pretrained(tiny_model_path), config)
    plan = plan_memory(shape, config, 64, "cpu")
    trainer = Trainer(Run.build(config))
    weights = {p.untyped_storage().data_ptr() for p in trainer.run.student.model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = list(range(10, 74))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Products() as products:
        hidden_rows(trainer.run.student.backbone, pack([ids] * 2, [ids] * 2, "cpu"))
    measured = sum(size for size, _ in kept.values())
    if mode is not None:  # while one layer is computed again, its own activations are there too
        measured += 2 * 128 * shape.elements * 4
    if mode == "selective":
        measured += sum(products.sizes.values())
    assert plan.activations == pytest.approx(measured, rel=0.3)


@pytest.mark.filterwarnings("ignore:no signal")
@pytest.mark.parametrize("objective", ["distill", "sft", "distill+sft"])
def test_references_that_are_trained_on_are_planned_where_they_are_longer_than_responses(
    tiny_config, tiny_model_path, sums, tmp_path, objective
):
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    for row in rows:
        row["solution"] = "Then she counts them again.\n\n" * 20 + row["solution"]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # a teacher's prompt that holds the reference would be as long
    source = {} if objective == "sft" else {"reference_source": "none"}
    settings = {"dataset_name": str(long), "num_generations": 2, "exposure_policy": "full"} | source
    config = tiny_config(objective=objective, **settings)
    shape = model_shape(AutoConfig.from_pretrained(tiny_model_path), config)
    said = dry_run(config)
    trainer, forwards = Trainer(Run.build(config)), []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            forwards.append((args[0] if args else kwargs["input_ids"]).numel())

    trainer.run.student.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    trainer.train_step(0)
    data = trainer.run.data
    prompt, read = max(student for student, _ in prompt_lengths(data)), longest_reference(config, data)
    assert ("references" in said.data["run"]) == any(read) == ("sft" in objective)
    plan = plan_memory(shape, config, prompt, "cpu", reference_tokens=read)
    a_token = plan_memory(shape, config, 0, "cpu").activations / (2 * 2 * config.max_completion_length)
    assert plan.activations / a_token == pytest.approx(max(forwards), rel=0.05)
    if objective == "distill+sft":
        assert said.data["bytes"]["activations"] == plan.activations


def test_the_rows_of_references_bound_the_planned_chunk_of_the_loss(tiny_config, tiny_model_path):
    def planned(objective, reference, responses=1):
        config = tiny_config(objective=objective, num_generations=responses, exposure_policy="full")
        shape = model_shape(AutoConfig.from_pretrained(tiny_model_path), config)
        return plan_memory(shape, config, 20, reference_tokens=(20, reference))

    short, long = planned("distill+sft", 12), planned("distill+sft", 500)
    assert short == planned("distill", 500) == planned("distill", 0), "no longer than the responses, or not trained on"
    assert long.loss_chunk == 8 * short.loss_chunk  # 2 * 500 rows and 2 * 12, in tiles of 128
    assert long.hidden_states == short.hidden_states // 12 * 500
    # `sft` takes a reference as each response; `distill+sft` takes it once
    assert planned("sft", 500, responses=4).hidden_states == 4 * planned("distill+sft", 500, responses=4).hidden_states


def test_the_plan_adds_up_and_shards_what_is_always_there(tiny_config, tiny_model_path):
    config = tiny_config()
    shape = model_shape(AutoConfig.from_pretrained(tiny_model_path), config)
    plan, half = (plan_memory(shape, config, 100, "cpu", Layout(shards=n, processes=n)) for n in (1, 2))
    assert plan.total == plan.always + max(plan.generating, plan.training)
    assert half.always == pytest.approx(plan.always / 2, rel=0.01)
    assert half.training - half.communication == plan.training > 0 and plan.total < GIB


def long_problem(sums: Path, folder: Path) -> str:
    """The sums, one of them with a solution of many steps and one with a problem no prompt can hold."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    rows[3]["solution"] = "".join(f"Step {i} adds {i}.\n\n" for i in range(80)) + "#### 6"
    rows[5]["problem"] = "How many? " * 800
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_that_do_not_fit_are_refused_skipped_or_cut_and_counted(tiny_config, sums, tmp_path):
    dataset = long_problem(sums, tmp_path)
    config = tiny_config(dataset_name=dataset, num_probe_problems=1)
    tokenizer = load_tokenizer(config)
    length = context_length(AutoConfig.from_pretrained(config.model_name_or_path))
    with pytest.raises(ValueError, match="overlong_problems: skip leaves such problems out"):
        load_run_data(config, tokenizer, length)

    config.overlong_problems = "skip"
    with pytest.warns(UserWarning, match="skipped 2 of 16 problems that do not fit"):
        data = load_run_data(config, tokenizer, length)
    assert {p.id for p in data.problems.train}.isdisjoint({"long-3", "long-5"})
    assert data.counts()["problems_too_long"] == 2

    config.overlong_problems = "cut"
    with pytest.warns(UserWarning, match="the teacher's context is cut for 1 of 16 problems"):
        data = load_run_data(config, tokenizer, length)
    assert list(data.exposure_limit) == ["long-3"] and data.counts()["teacher_contexts_cut"] == 1
    cut = next(p for p in [*data.problems.train, *data.problems.probe] if p.id == "long-3")
    reference, alpha = data.references["long-3"], data.alpha(cut, 1.0)
    fits = len(data.prompts.teacher(cut, reference, alpha)) + len(data.prompts.reference_completion(reference)[0])
    assert 0 < alpha < 1 and fits <= length
    one_more = len(data.prompts.teacher(cut, reference, alpha + 1 / len(reference.segments)))
    assert one_more + len(data.prompts.reference_completion(reference)[0]) > length


def test_a_run_with_a_cut_teacher_goes_through_and_counts_at_the_end(tiny_config, sums, tmp_path):
    config = tiny_config(
        dataset_name=long_problem(sums, tmp_path), overlong_problems="cut", exposure_policy="full", max_steps=1,
        per_device_train_batch_size=14, gradient_accumulation_steps=1, num_probe_problems=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="context is cut"):
        run_dir = train(config)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["teacher_contexts_cut"] == 1 and summary["problems_too_long"] == 1
    assert summary["problems_without_answer"] == 0


def test_a_dry_run_names_a_served_teacher_asks_nothing_of_it_and_counts_no_forward(tiny_config):
    served = {"teacher": "vllm_server", "teacher_base_url": "http://192.0.2.1:1", "scoring_temperature": 1.0}
    said = dry_run(tiny_config(**served))
    assert "top 64 of the server at http://192.0.2.1:1, which was not asked" in str(said)
    assert said.data["teacher"] is None and said.data["bytes"]["teacher"] == 0
    config, own = tiny_config(**served, use_peft=False), tiny_config(use_peft=False)
    shape = model_shape(AutoConfig.from_pretrained(config.model_name_or_path), config)
    assert plan_products(shape, config, 100).teacher == 0 < plan_products(shape, own, 100).teacher
    assert plan_products(shape, config, 100).loss < plan_products(shape, own, 100).loss
