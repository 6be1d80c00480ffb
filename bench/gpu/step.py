"""Stage 6: a step's training, ours and TRL's, at the sizes of Qwen3-1.7B with a LoRA of rank 64.

Teacher forward with the adapter off, student forward, loss, backward, without rollouts and without the optimizer, for
eight problems. The model is made on the GPU with random weights, prompts and responses are random tokens: time and
memory are those of a real step. There are two workloads: responses of one length, where nobody pads, and responses of
lengths spread evenly from 128 to 1,024 tokens. Only response tokens count, padding does not.

Ours are the parts of `Trainer.distill`, on packed rows. TRL's are its losses over batches padded to the longest
response: `SDFTTrainer`'s dense one, and `DistillationTrainer`'s chunked one, given the teacher's own prompt. Model,
adapter, autocast, temperature and gradient checkpointing are the same for all, and each takes the largest micro-batch
that fits. Variants take turns, in the second turn in reverse order, and all have run once before the first.

"host ms" is the time until a step's last launch. Waits for the GPU are in it, and TRL's forwards have one each: where
it is near the step's own time, the GPU may have waited for the host. Beside the measured bytes and seconds stand the
memory plan's, and those of `atesd scaling`.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd.config import ATESDConfig, load_config
from atesd.models.attention import packed
from atesd.models.loading import add_lora
from atesd.planning import scaling
from atesd.planning.gpu_specs import H100, H200
from atesd.planning.memory_plan import GIB, Layout, plan_memory
from atesd.planning.model_shape import model_shape
from atesd.planning.time_plan import plan_time
from atesd_kernels.integrations.head import unwrap
from bench import entrants
from bench.gpu.clock import first_line
from bench.gpu.stage import Stage
from bench.gpu.step_table import table  # noqa: F401, of this stage
from bench.gpu.step_variants import (
    CHUNKED,
    DENSE,
    DENSE_BF16,
    ONE_BY_ONE,
    OURS,
    VARIANTS,
    Phases,
    Setting,
    Sizes,
    Step,
    attention_of,
    layers_of,
)

RECIPE = "opsd-qwen3-1.7b"
BLOCKS, WARM_UP, TIMED = 2, 1, 3  # every variant has a block of steps in turn, as often as BLOCKS says
LEAST_LEFT = 8.0  # seconds without which no block begins
FULL = Sizes(8, 1024, 128, 512, (8, 4, 2, 1))
TOY = Sizes(2, 12, 6, 9, (2, 1))
SHORTEST = {FULL: 128, TOY: 5}  # response of the second workload
PLAIN, LIGER = Setting(liger=False, checkpointing=False), Setting(liger=True, checkpointing=False)
PLAIN_CHECKPOINTING, LIGER_CHECKPOINTING = (s._replace(checkpointing=True) for s in (PLAIN, LIGER))


class Group(NamedTuple):
    """Variants measured under one setting and workload."""

    setting: Setting
    spread: bool  # whether responses differ in length
    names: tuple[str, ...]


# Each tuple's groups take turns before the next one's begin; in order of worth
GROUPS = (
    (
        Group(PLAIN, False, (OURS, DENSE, CHUNKED)),
        Group(PLAIN, True, (OURS, DENSE, CHUNKED)),
        Group(LIGER, False, (OURS, DENSE, CHUNKED)),
        Group(LIGER, True, (OURS, DENSE, CHUNKED)),
    ),
    (Group(LIGER_CHECKPOINTING, False, (OURS, DENSE, CHUNKED)),),
    (Group(PLAIN, False, (ONE_BY_ONE, DENSE_BF16)),),
)
DRY_GROUPS = (
    (Group(PLAIN, False, GROUPS[0][0].names + GROUPS[-1][0].names), Group(PLAIN, True, (OURS, DENSE, CHUNKED))),
    (Group(PLAIN_CHECKPOINTING, False, (OURS, CHUNKED)),),
)


def qwen(dry: bool) -> PreTrainedConfig:
    """The configuration of Qwen3-1.7B, or of a toy of its kind."""
    if not dry:
        return scaling.MODELS["Qwen3-1.7B"]()
    return scaling.QWEN3(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip


def random_model(config: PreTrainedConfig, device: str) -> Any:
    """In bf16, made where it is to be."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def add_trained_lora(model: Any, settings: ATESDConfig, device: str) -> Any:
    """A fresh adapter's second factor is 0, as is then its first one's gradient: here neither is."""
    model = add_lora(model, settings).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    return model.train()


def run(stage: Stage) -> None:
    if stage.dry:
        torch.set_num_threads(1)  # toy products are faster so, beside other work
    sizes, model_config = TOY if stage.dry else FULL, qwen(stage.dry)
    settings = step_settings(sizes)
    stage.keep(sizes=sizes._asdict(), tokens=sizes.tokens, rows={}, failed={})
    predicted = predictions(model_config, settings, sizes)
    stage.keep(predicted=predicted)
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model = add_trained_lora(random_model(model_config, stage.device), settings, stage.device)
    weights = torch.cuda.memory_allocated() - before if torch.cuda.is_available() else 0
    step = Step(model, settings, sizes, stage.device)
    steps_of = {False: step, True: Step(model, settings, sizes._replace(shortest=SHORTEST[sizes]), stage.device)}
    stage.keep(weights=weights, parameters=sum(p.numel() for p in model.parameters()))
    stage.say(f"the model is there, {weights / GIB:.2f} GiB")
    stage.keep(packing=packing(step))
    rows, failed = {}, {}
    if stage.dry:
        with layers_of(model, LIGER):  # they can be put in place, and taken out again
            failed[LIGER.name] = entrants.NEEDS_GPU
    gc.collect()
    gc.freeze()  # a collection of all that was imported takes a fifth of a second, in whoever's step it falls
    settle(stage, step)
    for together in DRY_GROUPS if stage.dry else GROUPS:
        for turn in range(1 if stage.dry else BLOCKS):
            for group in together:
                try:
                    with layers_of(model, group.setting):
                        for name in group.names[:: -1 if turn % 2 else 1]:
                            one_block(stage, steps_of[group.spread], group.setting, name, rows, failed)
                            stage.keep(rows=rows, failed=failed)
                except Exception as error:  # the other groups go on
                    failed[f"all of {group.setting.name}"] = first_line(error)
                    stage.keep(failed=failed)
    equal_micro_batches(stage, step, rows, failed)
    stage.keep(rows=rows, failed=failed)


def settle(stage: Stage, step: Step) -> None:
    """Steps of everyone before the first that counts: libraries load, and clocks reach their working speed."""
    for name in (OURS, DENSE, CHUNKED):
        try:
            with attention_of(step, name):
                steps(stage, partial(VARIANTS[name], step, step.sizes.micro_batches[-1 if stage.dry else 0]), step, 1)
        except Exception as error:  # its blocks will say so too
            stage.say(f"{name}: {first_line(error)}")
        free(step)


def packing(step: Step) -> str:
    """Whether packed sequences stay apart on this GPU."""
    try:
        packed.use_packed_attention(unwrap(step.model))
        with step.autocast():
            packed.check_packing(step.model)
    except Exception as error:
        return first_line(error)
    return "kept apart"


def step_settings(sizes: Sizes) -> ATESDConfig:
    """The recipe's, without the clip, which TRL has not."""
    return replace(
        load_config(RECIPE, []),
        entry_clip=None,
        gradient_checkpointing=False,
        max_completion_length=sizes.response,
        per_device_train_batch_size=sizes.problems,
        gradient_accumulation_steps=1,
    )


def key_of(name: str, setting: Setting, sizes: Sizes) -> str:
    return f"{name}; {setting.name}; {sizes.workload}"


def one_block(
    stage: Stage, step: Step, setting: Setting, name: str, rows: dict, failed: dict, micro_batch: int = 0
) -> None:
    """A block of steps of one variant, added to its row. The first one finds its micro-batch, unless it is given."""
    key = key_of(name, setting, step.sizes) + (f"; micro-batches of {micro_batch}" if micro_batch else "")
    if key in failed:
        return
    if stage.left < LEAST_LEFT:
        if key not in rows:
            stage.leave_out(key, "no time was left")
        return
    tried = (micro_batch,) if micro_batch else (rows[key]["micro_batch"],) if key in rows else step.sizes.micro_batches
    for size in tried:
        failure = None
        try:
            with attention_of(step, name):
                found = steps(stage, partial(VARIANTS[name], step, size), step)
        except Exception as error:  # a peer that fails here is named, and the others are measured
            failure = first_line(error)
            too_large = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in failure
        free(step)
        if failure is None:
            break
        stage.say(f"{key}, micro-batches of {size}: {failure}")
        if not too_large:
            break
    if failure is not None:
        if key not in rows:
            failed[key] = failure
        return
    known = {
        "variant": name,
        "setting": setting.name,
        "workload": step.sizes.workload,
        "spread": step.sizes.shortest > 0,
    }
    row = rows.setdefault(key, {**known, "tokens": step.sizes.tokens, "micro_batch": size, "steps": []})
    row["steps"] += found
    row.update(summary(row["steps"], step.sizes.tokens))
    stage.say(
        f"{key}: {1e3 * row['seconds']:.0f} ms (host {1e3 * row['host_seconds']:.0f}), "
        f"{row['tokens_per_second']:.0f} tokens/s, peak {row['peak'] / GIB:.1f} GiB, micro-batches of {size}, "
        f"loss {row['loss']:.4g}"
    )


def steps(stage: Stage, variant: Callable[[Phases], Tensor], step: Step, timed: int = TIMED) -> list[dict]:
    """Steps after those that compile and fill the allocator's cache."""
    found = []
    for number in range(WARM_UP if stage.dry else 0, WARM_UP + (1 if stage.dry else timed)):
        for p in step.trained:
            p.grad = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        phases = Phases()
        loss = variant(phases)
        taken = phases.take() | {"loss": float(loss)}
        if number >= WARM_UP:
            found.append(taken)
    return found


def free(step: Step) -> None:
    """Give the allocator's cache back, so that the next variant finds the memory this one found."""
    for p in step.trained:
        p.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(found: list[dict], tokens: int) -> dict:
    """Medians of the steps. `bytes` are the last step's: they do not change."""
    seconds = statistics.median(s["seconds"] for s in found)
    return {
        "seconds": seconds,
        "fastest": min(s["seconds"] for s in found),
        "host_seconds": statistics.median(s["host_seconds"] for s in found),
        "tokens_per_second": tokens / seconds,
        **{
            kind: {name: statistics.median(s[kind][name] for s in found) for name in found[-1][kind]}
            for kind in ("phases", "host_phases")
        },
        "bytes": found[-1]["bytes"],
        "peak": max(s["peak"] for s in found),
        "loss": found[-1]["loss"],
    }


def equal_micro_batches(stage: Stage, step: Step, rows: dict, failed: dict) -> None:
    """Where TRL's dense loss had to take smaller micro-batches than ours: ours in those as well."""
    for setting in (PLAIN, LIGER, LIGER_CHECKPOINTING):
        pair = [rows.get(key_of(name, setting, step.sizes)) for name in (OURS, DENSE)]
        if None in pair or pair[0]["micro_batch"] == pair[1]["micro_batch"]:
            continue
        with layers_of(step.model, setting):
            one_block(stage, step, setting, OURS, rows, failed, pair[1]["micro_batch"])
        stage.keep(rows=rows, failed=failed)


def predictions(model_config: PreTrainedConfig, settings: ATESDConfig, sizes: Sizes) -> dict:
    """By layers and micro-batch: the plan's bytes for the student's prompt and for the teacher's, and the seconds of
    `atesd scaling`'s formulas for this GPU (an H200, or else an H100), the teacher's for the teacher's prompt."""
    shape = model_shape(model_config, settings)
    gpu = H200 if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name() else H100
    found: dict[str, dict] = {}
    prompts = (sizes.student_prompt, sizes.teacher_prompt)
    for setting in (PLAIN, LIGER, PLAIN_CHECKPOINTING, LIGER_CHECKPOINTING):
        for size in sizes.micro_batches:
            changed = replace(
                settings,
                gradient_checkpointing=setting.checkpointing,
                use_liger_kernel=setting.liger,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=sizes.problems // size,
            )
            plans = [plan_memory(shape, changed, p, "cuda", memory=gpu.memory) for p in prompts]
            times = [plan_time(shape, changed, p, gpu, Layout()) for p in prompts]
            found[f"{size}, {setting.name}"] = {
                "memory": asdict(plans[0]),
                "peak": plans[0].weights + plans[0].gradients + plans[0].training,
                "dry_run_peak": plans[1].weights + plans[1].gradients + plans[1].training,
                "seconds": {"teacher": times[1].teacher, "student": times[0].student, "loss": times[0].loss},
            }
    return found


def warm() -> list[Callable[[], object]]:
    """Calls that compile this library's kernels for a step: its loss with statistics, at a hidden size of 16."""

    def call() -> None:
        from atesd_kernels import linear_divergence

        rows = torch.zeros(FULL.tokens, 16, dtype=torch.bfloat16, device=entrants.DEVICE)
        weight = torch.zeros(qwen(dry=False).vocab_size, 16, dtype=torch.bfloat16, device=entrants.DEVICE)
        targets = torch.zeros(FULL.tokens, dtype=torch.long, device=entrants.DEVICE)
        settings = step_settings(FULL)
        linear_divergence(
            rows.clone().requires_grad_(), weight, rows, temperature=settings.scoring_temperature, targets=targets,
            num_tokens=FULL.tokens, return_stats=True,
        )[0].backward()  # fmt: skip

    return [call]
