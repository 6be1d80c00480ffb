"""The page beside trained weights."""

from __future__ import annotations

import pytest
import yaml

from atesd.config import load_config
from atesd.reports.model_card import model_card
from atesd.trainer import train

ESTIMATE = {"value": 0.25, "low": 0.1, "high": 0.4}
LEARNED = {"num_problems": 8, "before": ESTIMATE, "after": ESTIMATE, "change": ESTIMATE}


def test_a_card_says_what_the_weights_are_and_loads_on_the_hub():
    config = load_config("opsd-qwen3-1.7b", ["--dataset_name", "org/data"])
    card = model_card(config, 100, LEARNED)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == config.model_name_or_path
    assert "100 steps of objective `distill`, exposure policy `full` on org/data" in body
    assert "held-out accuracy 0.25 [0.10, 0.40]" in body and "AutoPeftModelForCausalLM" in body
    assert "held-out" not in model_card(config, 100, None)


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_run_writes_the_card_without_a_path_of_its_machine(tiny_config, tiny_model_path, use_peft):
    config = tiny_config(max_steps=1, use_peft=use_peft)
    card = (train(config) / ("adapter" if use_peft else "model") / "README.md").read_text()
    assert str(tiny_model_path.parent) not in card and tiny_model_path.name in card
    assert "base_model" not in card and "More Information" not in card
    assert ("AutoPeftModelForCausalLM" in card) == use_peft
