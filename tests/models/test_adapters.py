"""The switches of an adapter's layers: what they change, what they leave alone, and what a forward launches with them.

Launches are counted as the operators that reach torch's dispatcher and are no views: each is a kernel on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

from atesd.models.adapters import adapter_layers, adapter_off, has_plain_switch, inputs_cast_by_autocast
from atesd.models.attention import packed as packed_attention
from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import hidden_rows, pack
from atesd.models.teachers import Teacher
from atesd_kernels.integrations.head import unwrap

LAYERS, LINEARS = 3, 7
BATCH = pack([[5, 6, 7], [8, 9]], [[20, 21], [22, 23, 24]], "cpu")
VIEWS = ("view", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "t", "detach", "alias", "split")


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").strip("_")
        if name not in VIEWS and not name.endswith(("view", "empty_like")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def lora(**options):
    """A bfloat16 model of several layers under an adapter in float32 that changes its output."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_packed_attention(model)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, settings, autocast_adapter_dtype=True).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def states(model):
    with torch.autocast("cpu", torch.bfloat16):
        return hidden_rows(unwrap(model).model, BATCH)


def test_the_switch_gives_what_pefts_own_gives_and_leaves_the_weights_trained():
    model = lora()
    layers = adapter_layers(model)
    assert len(layers) == LAYERS * LINEARS and has_plain_switch(model)
    with torch.no_grad():
        student = states(model)
        with model.disable_adapter():
            expected = states(model)
        with adapter_off(layers):
            assert torch.equal(states(model), expected)
            assert any(p.requires_grad for p in model.parameters())
        assert torch.equal(states(model), student) and not torch.equal(student, expected)


def test_the_switch_is_back_after_an_error():
    layers = adapter_layers(lora())
    with pytest.raises(RuntimeError), adapter_off(layers):
        raise RuntimeError
    assert not any(layer.disable_adapters for layer in layers)


def test_copies_of_whole_modules_are_left_to_pefts_own_switch():
    model = lora(modules_to_save=["norm"])
    assert not has_plain_switch(model)
    with torch.no_grad():
        before = states(model)
        teacher = Teacher(model, "frozen")
        unwrap(model).model.norm.modules_to_save["default"].weight.add_(1.0)
        with torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
            expected = states(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(teacher.hidden(BATCH), expected) and not torch.equal(before, expected)


def test_a_model_without_an_adapter_has_no_layers_of_one():
    model = unwrap(lora()).model.layers[0].mlp.act_fn
    assert adapter_layers(model) == []


def test_the_teacher_leaves_every_module_in_the_mode_it_was_in():
    model = lora()
    frozen = unwrap(model).model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    teacher, seen = Teacher(model, "frozen"), []
    hook = frozen.register_forward_hook(lambda *_: seen.extend(module.training for module in model.modules()))
    teacher.hidden(BATCH)
    hook.remove()
    assert seen and not any(seen)
    assert [module.training for module in model.modules()] == modes


def test_inputs_cast_by_autocast_give_the_same_numbers_with_fewer_copies():
    model = lora()
    found = {}
    for switch in (nullcontext, lambda: inputs_cast_by_autocast(adapter_layers(model))):
        model.zero_grad()
        with switch():
            with Launches() as launches:
                out = states(model)
            kept = launches.names.count("to_copy")
            out.float().square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[len(found)] = out.detach(), gradient, kept
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].norm() > 0
    # attention on a CPU gives float32 here, so that the input of its projection has the adapter's dtype
    assert found[0][2] - found[1][2] == 2 * LAYERS * (LINEARS - 1), "to float32 and back"


def test_a_packed_row_launches_no_more_than_a_padded_batch(monkeypatch):
    """Teacher and student: attention in one call, and nothing copied around it."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), return_aux=None):
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        return torch.empty_like(query)

    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda device: True)
    model = lora()
    teacher, backbone = Teacher(model, "frozen", bf16=True), unwrap(model).model
    packed_attention.layout_of(BATCH.ends, torch.device("cpu"))  # the host's work, once a row
    with torch.autocast("cpu", torch.bfloat16), Launches() as ours:
        teacher.hidden(BATCH)
    with torch.autocast("cpu", torch.bfloat16), inputs_cast_by_autocast(adapter_layers(model)), Launches() as student:
        hidden_rows(backbone, BATCH)
    unwrap(model).set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7, 20, 21], [8, 9, 22, 23, 24]])
    with torch.no_grad(), model.disable_adapter(), torch.autocast("cpu", torch.bfloat16), Launches() as padded:
        backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    with torch.autocast("cpu", torch.bfloat16), Launches() as padded_student:
        backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for packed, other in ((ours, padded), (student, padded_student)):
        for name in ("to_copy", "clone", "cat", "copy"):
            assert packed.names.count(name) <= other.names.count(name), name
        assert len(packed.names) <= len(other.names)
    assert "local_scalar_dense" not in ours.names + student.names, "a wait for the GPU"
    assert len(ours.names) < 56 * LAYERS + 16
