"""The README.md beside trained weights: what they are, how they were made, how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from atesd.config import ATESDConfig
from atesd.reports.learned import headline

LOADING = {
    True: """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")""",
    False: """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")""",
}


def model_card(config: ATESDConfig, steps: int, learned: dict[str, Any] | None) -> str:
    """Returns the text of a run's model card. Folders of this machine are named by their last part.

    Args:
        steps: optimizer steps made.
        learned: the comparison of its evaluations, if it made any.
    """
    local = Path(config.model_name_or_path).exists()
    base, data = (Path(name).name if Path(name).exists() else name for name in (
        config.model_name_or_path, config.dataset_name))  # fmt: skip
    head: dict[str, Any] = {} if local else {"base_model": base}
    head |= {"library_name": "peft" if config.use_peft else "transformers", "tags": ["atesd", "on-policy-distillation"]}
    what = "A LoRA adapter of" if config.use_peft else "The trained weights of"
    exposure = f", exposure policy `{config.exposure_policy}`" if config.objective != "sft" else ""
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {base}, trained with atesd",
        f"{what} {base}: {steps} steps of objective `{config.objective}`{exposure} on {data}, at a learning rate of "
        f"{config.learning_rate:g}, {config.per_device_train_batch_size * config.gradient_accumulation_steps} problems "
        "a step and process.",
        *([f"In this run: {headline(learned)}."] if learned else []),
        f"```python\n{LOADING[config.use_peft]}\n```",
        "The method is *Adaptive Teacher Exposure for Self-Distillation* "
        "([arXiv 2605.11458](https://arxiv.org/abs/2605.11458)).",
    ]
    return "\n\n".join(lines) + "\n"
