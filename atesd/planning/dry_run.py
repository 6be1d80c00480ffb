"""`atesd train RECIPE --dry-run`: reports a run's problems, prompts and memory without loading weights.

It needs only the model's configuration and tokenizer. It does not train, load weights or write files.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch

from atesd.config import ATESDConfig
from atesd.config.mixture import teacher_forwards, views_of
from atesd.data.run_data import RunData, load_run_data
from atesd.models.loading import check_lora, context_length, load_model_config, load_tokenizer
from atesd.models.other_teacher import checked_teacher_config
from atesd.models.precision import settle_precision
from atesd.planning.memory_plan import GIB, MemoryPlan, plan_memory, references_in_batch, teacher_model_bytes
from atesd.planning.model_shape import ModelShape, model_shape, teacher_shape
from atesd.reports.printout import Printout, Table
from atesd_kernels.planning import gpu_memory

PROMPTS_SHOWN = 2
PROMPTS_MEASURED = 256


def dry_run(config: ATESDConfig) -> Printout:
    """Returns the report: problems, memory plan and first prompts.

    Raises:
        ValueError, ModelLoadError: for any fault that would stop the run before its first step, except in its weights.
            Does not check this machine's hardware: the plan may be for another machine.
    """
    config.validate()
    settle_precision(config)
    tokenizer, model_config = load_tokenizer(config), load_model_config(config)
    check_lora(model_config, config)
    teacher_config = checked_teacher_config(config, tokenizer)
    teacher_context = context_length(teacher_config) if teacher_config else None
    data = load_run_data(config, tokenizer, context_length(model_config), teacher_context)
    lengths = prompt_lengths(data)
    shape, other = model_shape(model_config, config), teacher_shape(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = gpu_memory(torch.device(device))
    longest, references = max(max(pair) for pair in lengths), longest_reference(config, data)
    plan = plan_memory(shape, config, longest, device, memory=memory, teacher=other, reference_tokens=references)
    student, teacher = (sorted(column) for column in zip(*lengths, strict=True))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    notes = {
        "model": f"{config.model_name_or_path}, held in {config.torch_dtype}" + (", bf16 autocast" * config.bf16),
        "batch": f"{batch} problems a step and process, {config.num_generations} responses each",
        "prompt tokens": f"student {statistics.median(student):g}, at most {student[-1]}; "
        f"teacher at alpha = 1 {statistics.median(teacher):g}, at most {teacher[-1]} (of {len(lengths)} problems)",
        "planned for": f"{device}, responses of {config.max_completion_length} tokens, the longest of these prompts",
    }
    if any(references):
        notes["references"] = f"trained on, at most {sum(references)} tokens with the student's prompt"
    if other is not None:
        notes["teacher"] = (
            f"{config.teacher_model_name_or_path}, {other.parameters:,} parameters in {config.teacher_weights}, "
            f"{teacher_model_bytes(other, config) / GIB:.2f} GiB on {config.teacher_device or 'the same device'}"
        )
    if config.teacher == "vllm_server":
        notes["teacher"] = f"top {config.teacher_top_k} of the server at {config.teacher_base_url}, which was not asked"
    names, weights = views_of(config)
    if len(names) > 1:
        mixed = " ".join(f"{weight:+g} {name}" for name, weight in zip(names, weights, strict=True))
        notes["target"] = f"{mixed}: {teacher_forwards(config)} teacher forwards a response"
    if config.weight_column is not None:
        notes["weights"] = weights_line(config.weight_column, [p.weight for p in data.problems.train])
    if device == "cuda":
        notes["this GPU"] = f"{memory / GIB:.1f} GiB"
    prompts = first_prompts(config, data, tokenizer)
    plan_table = Table("memory plan of one process", plan_rows(plan, shape, config), ["part", "size", ""])
    counts = Table("problems", [[name, f"{count:,}"] for name, count in data.counts().items()])
    if data.no_signal():
        notes["no signal"] = "the teacher reads what the student reads"
    texts = [f"--- {p['problem']}, {p['prompt']} ({p['tokens']} tokens)\n{p['text']}" for p in prompts]
    return Printout(
        [Table("run", [[*note] for note in notes.items()]), plan_table, counts, *texts],
        {
            "run": notes,
            "bytes": {**asdict(plan), "total": plan.total},
            "parameters": {"model": shape.parameters, "adapter": shape.lora_parameters},
            "teacher": None if other is None else asdict(other) | {"bytes": teacher_model_bytes(other, config)},
            "problems": data.counts(),
            "prompts": prompts,
        },
    )


def weights_line(column: str, weights: list[float]) -> str:
    return f"column {column}: {min(weights):g} to {max(weights):g}, mean {statistics.fmean(weights):g}"


def first_prompts(config: ATESDConfig, data: RunData, tokenizer: Any) -> list[dict[str, Any]]:
    """What student and teacher read of the first problems, and the reply that is scored."""
    rows = []
    for problem in data.problems.train[:PROMPTS_SHOWN]:
        reference = data.references[problem.id]
        alpha = data.alpha(problem, exposure_shown(config))
        ids = {
            "student": data.prompts.student(problem),
            f"teacher, alpha = {alpha:g}": data.teacher_prompt(problem, alpha),
            "reference reply": data.prompts.reference_completion(reference)[0],
        }
        rows += [
            {"problem": problem.id, "prompt": name, "tokens": len(tokens), "text": tokenizer.decode(tokens)}
            for name, tokens in ids.items()
        ]
    return rows


def exposure_shown(config: ATESDConfig) -> float:
    """Returns the run's only exposure, or the middle of its range."""
    only = {"full": 1.0, "fixed": config.fixed_alpha}
    return only.get(config.exposure_policy, (config.alpha_min + config.alpha_max) / 2)


def prompt_lengths(data: RunData) -> list[tuple[int, int]]:
    """Returns (student, teacher at the largest alpha) prompt lengths in tokens, for the first problems."""
    return [
        (len(data.prompts.student(p)), len(data.teacher_prompt(p, data.alpha(p, 1.0))))
        for p in data.problems.train[:PROMPTS_MEASURED]
    ]


def longest_reference(config: ATESDConfig, data: RunData) -> tuple[int, int]:
    """Returns the tokens of the student's prompt and of the reference, of the training problem that has most of them;
    (0, 0) if the objective does not train on references."""
    if not references_in_batch(config):
        return 0, 0
    read = (data.imitated([problem]) for problem in data.problems.train)
    return max(((len(prompt), len(reply)) for (prompt,), (reply,), _ in read), key=sum)


def plan_rows(plan: MemoryPlan, shape: ModelShape, config: ATESDConfig) -> list[list[str]]:
    """Returns the parts of the plan, each with its size and what it is."""
    teacher = "a copy beside the student's weights" if plan.teacher else "the base: no copy"
    if config.teacher == "model":
        elsewhere = f"only what the loss reads: the model is on {config.teacher_device}"
        teacher = elsewhere if config.teacher_device else "another model, with what the loss reads of its head"
    if config.teacher == "vllm_server":
        teacher = "behind a server"
    rows = [
        ("weights", plan.weights, f"{shape.parameters:,} parameters, and {shape.lora_parameters:,} of the adapter"),
        ("teacher", plan.teacher, teacher),
        ("gradients", plan.gradients, ""),
        ("optimizer", plan.optimizer, "AdamW: two moments"),
        ("KV cache", plan.kv_cache, "while generating, all rollouts of a step at once"),
        ("decoding copies", plan.decoding_copies, "while generating: matrices in the processor's layout"),
        ("autocast copies", plan.autocast_copies, "while training"),
        ("activations", plan.activations, "while training; estimated"),
        ("hidden states", plan.hidden_states, "while training"),
        ("loss chunk", plan.loss_chunk, f"while training; the only thing {shape.vocab:,} wide"),
        ("head's gradient", plan.head_gradient, "while training, added up over the loss's chunks"),
        ("total", plan.total, "always there + the larger of generating and training"),
    ]
    shown = [row for row in rows if row[1] or row[0] == "teacher"]
    return [[name, f"{size / GIB:.2f} GiB", note] for name, size, note in shown]
