"""Linear layers that read the same input are one product: each gets its own output, whatever it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from atesd.rollout.decoding.layers import PackedLinear, PackedProduct, decoding_model, groups_of, packable_layers
from atesd_kernels.backends.matmul import onednn_packs

pytestmark = pytest.mark.skipif(not onednn_packs(torch.float32), reason="oneDNN has no layout of its own here")


@pytest.fixture
def layers():
    """Three layers of different sizes, of which one has no bias."""
    torch.manual_seed(0)
    return [nn.Linear(24, 40), nn.Linear(24, 8, bias=False), nn.Linear(24, 16)]


@pytest.fixture
def packed(layers):
    product = PackedProduct(list(layers))
    product.pack(torch.float32)
    return [PackedLinear(product, i) for i in range(3)]


def assert_same(twin, layer, x):
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_layer_of_a_product_has_its_own_rows_and_bias(layers, packed):
    x = torch.randn(2, 5, 24)
    for order in ((0, 1, 2), (2, 0, 1)):
        for i in order:
            assert_same(packed[i], layers[i], x)


@torch.no_grad()
def test_layers_that_read_other_inputs_after_all_are_not_given_those_of_the_first(layers, packed):
    x, memory = torch.randn(2, 5, 24), torch.randn(2, 7, 24)  # attention over another sequence
    assert_same(packed[0], layers[0], x)
    assert_same(packed[1], layers[1], memory)
    assert_same(packed[2], layers[2], memory)
    for _ in range(2):  # one layer twice, the others never
        assert_same(packed[0], layers[0], x)


@torch.no_grad()
def test_three_layers_are_one_product_and_nothing_of_it_stays(packed, monkeypatch):
    calls, product = [], packed[0].product
    ops = torch.ops.mkldnn
    real = ops._linear_pointwise
    monkeypatch.setattr(ops, "_linear_pointwise", lambda *args: calls.append(args) or real(*args))
    x = torch.randn(2, 5, 24)
    for layer in packed:
        layer(x)
    assert len(calls) == 1
    assert product.read is None and not product.outputs, "the last layer frees input and outputs"
    packed[0](x)
    product.free()
    assert product.weight is product.bias is product.read is None and not product.outputs


def test_groups_are_whole_or_not_at_all():
    names = {"a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.q_proj", "b.v_proj", "m.up_proj", "m.gate_proj", "head"}
    model = nn.Module()
    for name in sorted(names):
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model.get_submodule(parent).add_module(child, nn.Linear(8, 4))
    found = groups_of(model, frozenset(names))
    whole = [group for group in found if len(group) > 1]
    assert sorted(whole) == [["a.q_proj", "a.k_proj", "a.v_proj"], ["m.gate_proj", "m.up_proj"]]
    assert sorted(name for group in found for name in group) == sorted(names)
    model.a.k_proj = nn.Linear(16, 4)  # reads another sequence, of another width
    assert [group for group in groups_of(model, frozenset(names)) if len(group) > 1] == [["m.gate_proj", "m.up_proj"]]


FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_neox", "mamba2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_s_logits_are_those_of_its_own_layers(family):
    """Biases on some layers (Qwen 2), norms of heads (Qwen 3), layers already joined (Phi 3), other names (NeoX),
    a model that looks at the weights (Mamba 2)."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    sizes |= {"mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1}}.get(family, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    ids = torch.randint(1, 99, (3, 10))
    expected = model(input_ids=ids).logits
    with decoding_model(model, torch.float32, packable_layers(model, {})) as twin:
        torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert twin(input_ids=ids).logits.is_inference()
        joint = {id(m.product) for m in twin.modules() if isinstance(m, PackedLinear) and len(m.product.rows) > 1}
    assert len(joint) == {"phi3": 0, "gpt_neox": 0, "mamba2": 0}.get(family, 4)


def test_the_model_itself_is_as_it_was(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).train()
    ids, kept = torch.tensor([[5, 6, 7]]), {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    buffers, name = dict(model.named_buffers()), model.config._attn_implementation
    with decoding_model(model, torch.float32, packable_layers(model, {})) as twin, torch.no_grad():
        twin(input_ids=ids)
        assert twin is not model
    assert model.training and model.config._attn_implementation == name
    assert all(not b.is_inference() and b is buffers[n] for n, b in model.named_buffers())
    model(input_ids=ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        assert id(p) == kept[n][0] and torch.equal(p, kept[n][1]) and p.grad is not None, n
