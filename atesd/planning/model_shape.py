"""The sizes of a model that the formulas of memory and time need, from its configuration.

Parameters are counted on torch's meta device, so the numbers are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd.config import ATESDConfig
from atesd.models.loading import load_model_config
from atesd.models.other_teacher import teacher_source


@dataclass(frozen=True)
class ModelShape:
    """The model sizes that the formulas need.

    Attributes:
        parameters: number of the model's parameters; a tied head counts once.
        lora_parameters: number of the adapter's parameters; 0 without one.
        matrices: parameters of all linear layers but the head; autocast casts these.
        layers, hidden, intermediate, vocab: as in the model's configuration.
        query, kv: width of the query, and of the key (= value) projection: heads times head size.
    """

    parameters: int
    lora_parameters: int
    matrices: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    kv: int
    vocab: int

    @property
    def elements(self) -> int:
        """Numbers autograd saves per token and layer: both norms' input, normed and scaled output (6 h); query,
        attention output and its transposed copy (3 q); key and value (2 kv); gate, its activation, up, product (4 i).
        """
        return 6 * self.hidden + 3 * self.query + 2 * self.kv + 4 * self.intermediate

    @property
    def products(self) -> int:
        """Numbers that GEMMs and attention return per token and layer: query, key, value, attention and its
        projection, gate, up and down."""
        return 2 * self.query + 2 * self.kv + 2 * self.hidden + 2 * self.intermediate


def model_shape(model_config: PreTrainedConfig, config: ATESDConfig) -> ModelShape:
    """Returns the sizes of a model, which it builds on the meta device, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = head_size(text)
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets = [name.strip() for name in config.lora_target_modules.split(",")]
    adapted = [
        m for name, m in linears.items() if config.lora_target_modules == "all-linear" or name.split(".")[-1] in targets
    ]
    # a LoRA pair: A (r, in) and B (out, r)
    lora = sum(config.lora_r * (m.in_features + m.out_features) for m in adapted) if config.use_peft else 0
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        lora_parameters=lora,
        matrices=sum(m.weight.numel() for m in linears.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * head_dim,
        kv=key_size(text),
        vocab=text.vocab_size,
    )


def teacher_shape(config: ATESDConfig) -> ModelShape | None:
    """Returns the sizes of the other model that teaches; None if there is none. Raises ModelLoadError."""
    source = teacher_source(config)
    return None if source is None else model_shape(load_model_config(source), replace(config, use_peft=False))


def head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def key_size(text: PreTrainedConfig) -> int:
    """Returns the size of a token's keys in one layer, over all heads. Its values have the same size."""
    return (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_size(text)


def cached_numbers(layers: int, key_size: int) -> int:
    """Returns how many numbers a key-value cache stores per token: a key and a value in every layer."""
    return 2 * layers * key_size
