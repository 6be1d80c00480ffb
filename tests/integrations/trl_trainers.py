"""TRL trainers on the tiny model, ready to train a few steps: what the TRL tests compare."""

from __future__ import annotations

import warnings

import datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "you are importing from trl.experimental"
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

QUESTIONS = ["two and three", "a long question about the answer step by step", "so we have", "the solution"]
SOLUTION = "First we have two.\nThen we have three.\nSo the answer is five.\n#### 5"
COMMON = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
ROLLOUT = {"num_generations": 2, "max_completion_length": 12, "distillation_mode": "full_logits"}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def longer_is_better(completions, **_):
    """Half of the rollouts succeed, so that SDPO has demonstrations to show."""
    return [float(i % 2) for i in range(len(completions))]


def make_trainer(kind: str, path, folder, *, lora: bool = False, trainer_class: type | None = None, **changes):
    """`kind` in sdft, sdpo, gkd, distillation; `changes` go to its config."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    teacher = AutoModelForCausalLM.from_pretrained(path)
    rows = [{"prompt": user(q), "privileged_context": SOLUTION} for q in QUESTIONS]
    peft = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    shared = {"processing_class": tokenizer, "peft_config": peft}
    options = {"output_dir": str(folder), **COMMON}
    if kind == "sdft":
        config = SDFTConfig(**{**options, **ROLLOUT, **changes})
        return (trainer_class or SDFTTrainer)(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), **shared
        )
    if kind == "sdpo":
        config = SDPOConfig(**{**options, **ROLLOUT, **changes})
        return (trainer_class or SDPOTrainer)(
            model=model,
            reward_funcs=longer_is_better,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            **shared,
        )
    for p in teacher.parameters():
        p.data.mul_(1.3)  # another model, so that there is something to learn
    if kind == "gkd":
        config = GKDConfig(**{**options, "max_new_tokens": 12, "lmbda": 0.5, **changes})
        rows = [{"messages": user(q) + [{"role": "assistant", "content": SOLUTION}]} for q in QUESTIONS]
        return (trainer_class or GKDTrainer)(
            model=model, teacher_model=teacher, args=config, train_dataset=datasets.Dataset.from_list(rows), **shared
        )
    config = DistillationConfig(**{**options, "max_completion_length": 12, **changes})
    rows = [{"prompt": user(q)} for q in QUESTIONS]
    return (trainer_class or DistillationTrainer)(
        model=model, teacher_model=teacher, args=config, train_dataset=datasets.Dataset.from_list(rows), **shared
    )
