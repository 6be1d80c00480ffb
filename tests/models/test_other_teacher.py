"""A teacher that is another model: what it computes, where it lies, and what is refused before it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atesd.errors import ConfigError, ModelError
from atesd.models.batching import pack
from atesd.models.loading import ModelLoadError, load_model, load_tokenizer
from atesd.models.other_teacher import (
    OtherTeacher,
    check_teacher_place,
    checked_teacher_config,
    load_teacher,
    make_other_teacher,
    teacher_source,
)
from atesd.models.scoring import token_logprobs
from atesd.parallel.parallelism import FSDP2, Parallelism
from atesd.parallel.processes import Processes
from atesd.planning.memory_plan import teacher_model_bytes
from atesd.planning.model_shape import teacher_shape
from atesd_kernels.integrations.backbone import BackboneOutput
from atesd_kernels.integrations.head import HeadSpec, hidden_states_and_head

BATCH = pack([[5, 6, 7], [8, 9]], [[20, 21], [22, 23, 24]], "cpu")


@pytest.fixture
def config(tiny_config, other_model_path):
    def make(**changes):
        settings = {"teacher": "model", "teacher_model_name_or_path": str(other_model_path), "bf16": False}
        return tiny_config(**{**settings, **changes})

    return make


@pytest.fixture
def build(config):
    """The teacher that a run with these settings has, and its student."""

    def make(**changes):
        settings = config(**changes)
        student = load_model(settings)
        _, head = hidden_states_and_head(student)
        place = Parallelism(Processes(), torch.device("cpu"))
        return make_other_teacher(settings, teacher_source(settings), head, load_tokenizer(settings), place), student

    return make


def changed(folder, tmp_path, **settings):
    """A copy of the model in `folder` with another config.json."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(copy)


def test_it_gives_the_hidden_states_and_log_probabilities_of_its_own_model(build, other_model_path):
    teacher, _ = build(teacher_weights="float32")
    model = AutoModelForCausalLM.from_pretrained(other_model_path)
    logprobs = token_logprobs(teacher.backbone_call, teacher.head, BATCH)
    known = 300  # tokens of the tokenizer
    expected, states = [], []
    for prompt, response in (([5, 6, 7], [20, 21]), ([8, 9], [22, 23, 24])):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        rows = slice(len(prompt) - 1, -1)
        states.append(out.hidden_states[-1][0, rows])
        expected.append(out.logits[0, rows, :known].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(teacher.hidden(BATCH), torch.cat(states), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_it_is_frozen_holds_bfloat16_and_its_head_has_the_types_and_rows_of_the_loss(build):
    teacher, _ = build()
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    assert teacher.head.weight.shape == (300, 48) and teacher.head.weight.dtype == torch.float32
    assert teacher.hidden(BATCH).shape == (5, 48) and teacher.hidden(BATCH).dtype == torch.float32
    assert not teacher.shares_head and teacher.state_dict() == {"kind": "model", "values": {}}


def test_under_autocast_its_head_is_not_copied(build):
    with torch.autocast("cpu", torch.bfloat16):
        teacher, _ = build(bf16=True)
        assert teacher.head.weight.data_ptr() == teacher.model.get_output_embeddings().weight.data_ptr()
        assert teacher.hidden(BATCH).dtype == torch.bfloat16


def test_inputs_go_to_its_device_and_states_come_back(build, monkeypatch):
    teacher, _ = build()
    sent = []
    to = torch.Tensor.to

    def backbone(**inputs):
        assert inputs["attention_mask"] is BATCH.ends, "kernels look their layout up by this very tensor"
        return BackboneOutput(torch.zeros(1, inputs["input_ids"].shape[1], 48, dtype=torch.bfloat16))

    teacher.backbone, teacher.device = backbone, torch.device("cpu", 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **_: sent.append((self.dtype, args)) or to(self, *args))
    hidden = teacher.hidden(BATCH)
    monkeypatch.undo()
    assert sent == [(torch.int64, (teacher.device,))] * 2 + [(torch.bfloat16, (teacher.loss_device, torch.float32))]
    assert hidden.shape == (5, 48)


def test_a_response_with_an_entry_that_the_teacher_lacks_is_refused_by_name(build):
    teacher, _ = build()
    with pytest.raises(ModelError, match="holds token 300, and teacher and student share 300 entries"):
        teacher.hidden(pack([[5]], [[20, 300]], "cpu"))


def test_a_checkpoint_of_another_kind_is_refused(build):
    with pytest.raises(ValueError, match="teacher='ema', not 'model'"):
        build()[0].load_state_dict({"kind": "ema", "values": {}})


def test_its_own_scale_of_the_logits_is_used(build, config, tmp_path, tiny_model_path):
    """Granite divides its logits; a Llama of the same vocabulary does not."""
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(
        vocab_size=304, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, logits_scaling=4.0,
    ))  # fmt: skip
    granite.save_pretrained(tmp_path / "granite")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "granite")
    teacher, _ = build(teacher_model_name_or_path=str(tmp_path / "granite"))
    assert teacher.head.scale == 0.25


def test_a_teacher_that_caps_its_logits_where_the_student_does_not_is_refused_before_it_is_loaded(
    config, other_model_path, tmp_path
):
    settings = config(teacher_model_name_or_path=changed(other_model_path, tmp_path, final_logit_softcapping=30.0))
    with pytest.raises(ModelLoadError, match=r"final_logit_softcapping is 30.0, and the student's is None"):
        checked_teacher_config(settings, load_tokenizer(settings))


@pytest.mark.parametrize(("stored", "weights", "advice"), [
    ({"quant_method": "gptq", "bits": 4}, "4bit", r"'gptq'.*teacher_weights is '4bit': use its unquantised files"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bfloat16", "set teacher_weights to '4bit'"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "float32", "use its unquantised files"),
])  # fmt: skip
def test_files_that_are_quantised_in_another_way_than_asked_for_are_refused(
    config, other_model_path, tmp_path, stored, weights, advice
):
    folder = changed(other_model_path, tmp_path, quantization_config=stored)
    settings = config(teacher_model_name_or_path=folder, teacher_weights=weights)
    with pytest.raises(ModelLoadError, match=advice):
        checked_teacher_config(settings, load_tokenizer(settings))


def test_a_cap_that_no_setting_names_is_refused_once_it_is_measured(build):
    teacher, _ = build()
    capped = HeadSpec(teacher.head.weight[:, :32].clone(), None, softcap=30.0)
    with pytest.raises(ModelError, match=r"cannot teach this student: .*different logit softcaps"):
        OtherTeacher(teacher.model, capped, 290)


def test_an_adapter_in_the_place_of_the_teacher_is_refused_with_the_command_that_helps(
    config, tiny_model_path, tmp_path
):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "run" / "adapter")
    for folder in (tmp_path / "run" / "adapter", tmp_path / "run"):
        settings = config(teacher_model_name_or_path=str(folder))
        says = f"teacher_model_name_or_path is '{folder}', .* an adapter: `atesd merge {folder} --output_dir"
        with pytest.raises(ModelLoadError, match=says):
            checked_teacher_config(settings, load_tokenizer(settings))


def test_a_run_without_an_adapter_in_the_place_of_the_teacher_is_told_where_its_model_is(
    config, tiny_model_path, tmp_path
):
    shutil.copytree(tiny_model_path, tmp_path / "run" / "model")
    settings = config(teacher_model_name_or_path=str(tmp_path / "run"))
    with pytest.raises(ModelLoadError, match=f"the run's model is in {tmp_path / 'run' / 'model'}"):
        checked_teacher_config(settings, load_tokenizer(settings))


def test_a_folder_without_weights_is_refused_under_the_teachers_setting(config, other_model_path, tmp_path):
    copy = shutil.copytree(other_model_path, tmp_path / "bare")
    (copy / "model.safetensors").unlink()
    settings = config(teacher_model_name_or_path=str(copy))
    checked_teacher_config(settings, load_tokenizer(settings))
    with pytest.raises(ModelLoadError, match=r"^teacher_model_name_or_path is .*which does not load"):
        load_teacher(settings, teacher_source(settings), Parallelism(Processes(), torch.device("cpu")))


def test_a_place_that_this_machine_or_these_processes_do_not_have_is_refused(config):
    one = Parallelism(Processes(), torch.device("cpu"))
    check_teacher_place(config(teacher_device="cpu"), one)
    with pytest.raises(ConfigError, match="teacher_device is 'cuda:77', which this machine does not have"):
        check_teacher_place(config(teacher_device="cuda:77"), one)
    with pytest.raises(ConfigError, match="teacher_device is 'quantum', which this machine does not have"):
        check_teacher_place(config(teacher_device="quantum"), one)
    with pytest.raises(ConfigError, match="teacher_device is 'meta', which this machine does not have"):
        check_teacher_place(config(teacher_device="meta"), one)
    two = Parallelism(Processes(), torch.device("cpu"))
    two.processes.count = 2
    with pytest.raises(ConfigError, match="teacher_device is 'cpu', and 2 processes train"):
        check_teacher_place(config(teacher_device="cpu"), two)
    sharded = FSDP2(two.processes, torch.device("cpu"), None)
    with pytest.raises(ConfigError, match="teacher_weights is '4bit' under FSDP2"):
        check_teacher_place(config(teacher_weights="4bit"), sharded)


@pytest.mark.filterwarnings("ignore")
def test_matrices_of_4_bits_are_loaded_beside_a_head_and_an_embedding_that_are_not(build, config):
    pytest.importorskip("bitsandbytes")
    four, full = (build(teacher_weights=name)[0] for name in ("4bit", "float32"))
    names = {name: type(p).__name__ for name, p in four.model.named_parameters() if type(p).__name__ != "Parameter"}
    matrices = [n for n, m in full.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert names == {f"{name}.weight": "Params4bit" for name in matrices}
    assert four.model.get_output_embeddings().weight.dtype == torch.bfloat16
    got, expected = four.hidden(BATCH), full.hidden(BATCH)
    assert 0 < (got - expected).norm() < 0.5 * expected.norm(), "4 bits of random weights"
    planned = teacher_model_bytes(teacher_shape(config()), config(teacher_weights="4bit"))
    quantised = [p.quant_state for p in four.model.parameters() if hasattr(p, "quant_state")]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in quantised)
    assert planned == pytest.approx(sum(p.nbytes for p in four.model.parameters()) + scales, rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_4_bits_give_the_teacher_that_was_quantised_on_loading(
    build, config, tmp_path, other_model_path
):
    pytest.importorskip("bitsandbytes")
    first, _ = build(teacher_weights="4bit")
    stored = str(tmp_path / "stored")
    first.model.set_attn_implementation("sdpa")
    first.model.save_pretrained(stored)
    load_tokenizer(config()).save_pretrained(stored)
    again = config(teacher_weights="4bit", teacher_model_name_or_path=stored)
    checked_teacher_config(again, load_tokenizer(again))
    second, _ = build(teacher_weights="4bit", teacher_model_name_or_path=stored)
    torch.testing.assert_close(second.hidden(BATCH), build(teacher_weights="4bit")[0].hidden(BATCH))
