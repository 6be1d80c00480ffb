"""Stage 6: a step's training, ours and TRL's, at the sizes of Qwen3-1.7B with a LoRA of rank 64.

Teacher forward with the adapter off, student forward, loss, backward, without rollouts and without the optimizer:
eight problems with 1,024 response tokens each. The model is made on the GPU with random weights, prompts and responses
are random tokens: time and memory are those of a real step. Ours are the parts of `Trainer.distill`, on packed rows.
TRL's are its losses over padded batches, which here hold no padding, for all sequences have one length: `SDFTTrainer`'s
dense one, and `DistillationTrainer`'s chunked one, given the teacher's own prompt. Model, adapter, autocast,
temperature and gradient checkpointing are the same for all, and each takes the largest micro-batch that fits.

Beside the measured bytes and seconds stand the memory plan's, and those of `atesd scaling`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from atesd import packed_attention, scaling
from atesd.batching import assert_same_responses, chunks, hidden_rows, pack
from atesd.config import ATESDConfig, load_config
from atesd.memory_plan import GIB, H100, Layout, model_shape, plan_memory, plan_time
from atesd.models import add_lora, use_liger_kernels
from atesd.objectives import ResponseTokens, TokenTotals, make_objective
from atesd.recompute import recompute_activations
from atesd.teachers import Teacher
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap
from bench import entrants
from bench.gpu.clock import first_line
from bench.gpu.stage import Stage
from bench.machine import markdown

RECIPE = "opsd-qwen3-1.7b"
BLOCKS, WARM_UP, TIMED = 2, 1, 3  # every variant has a block of steps in turn, as often as BLOCKS says
LEAST_LEFT = 8.0  # seconds without which no block begins
OURS, ONE_BY_ONE = "atesd", "atesd, sdpa one call a sequence"
DENSE, DENSE_BF16 = "TRL dense loss (SDFTTrainer)", "TRL dense loss, its logits left in bf16"
CHUNKED = "TRL chunked loss (DistillationTrainer)"


class Sizes(NamedTuple):
    problems: int
    response: int
    student_prompt: int
    teacher_prompt: int
    micro_batches: tuple[int, ...]  # tried from the left

    @property
    def tokens(self) -> int:
        """The step's response tokens."""
        return self.problems * self.response


class Setting(NamedTuple):
    """What the layers do, for all variants of a group alike."""

    liger: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        layers = "Liger's layers" if self.liger else "transformers' layers"
        return layers + (", checkpointing" if self.checkpointing else "")


FULL = Sizes(8, 1024, 128, 512, (8, 4, 2, 1))
TOY = Sizes(2, 12, 6, 9, (2, 1))
PLAIN, LIGER = Setting(liger=False, checkpointing=False), Setting(liger=True, checkpointing=False)
# in order of worth
GROUPS = {
    PLAIN: (OURS, DENSE, CHUNKED, ONE_BY_ONE, DENSE_BF16),
    LIGER: (OURS, DENSE, CHUNKED),
    LIGER._replace(checkpointing=True): (OURS, DENSE, CHUNKED),
}


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


@dataclass
class Step:
    """The model, and what a step reads."""

    model: Any
    settings: ATESDConfig
    sizes: Sizes
    device: str

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab = self.model.config.vocab_size

        def tokens(length: int) -> list[list[int]]:
            return torch.randint(vocab, (self.sizes.problems, length), generator=generator).tolist()

        self.student_prompts = tokens(self.sizes.student_prompt)
        self.teacher_prompts = tokens(self.sizes.teacher_prompt)
        self.responses = tokens(self.sizes.response)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.backbone, self.head = hidden_states_and_head(self.model)
        self.teacher = Teacher(self.model, "frozen", bf16=True)
        self.objective = make_objective(self.settings)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def padded(self, prompts: list[list[int]], part: slice) -> Tensor:
        """`(batch, length)`: prompts with their responses, none of which needs padding."""
        rows = [p + r for p, r in zip(prompts[part], self.responses[part], strict=True)]
        return torch.tensor(rows, device=self.device)


class Phases:
    """Seconds of a step's phases, and the memory at their ends. Bytes are 0 on a CPU."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.found: list[tuple[str, Any, Any, int, int, int]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        before, start = self.allocated(), self.now()
        yield
        peak = torch.cuda.max_memory_allocated() if self.gpu else 0
        self.found.append((name, start, self.now(), before, self.allocated(), peak))

    def now(self) -> Any:
        """An event the GPU will come to, or the seconds of a CPU's clock."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.gpu else 0

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start

    def take(self) -> dict:
        """What the step came to. Waits for it."""
        if self.gpu:
            torch.cuda.synchronize()
        phases: dict[str, float] = {}
        for name, start, end, *_ in self.found:
            phases[name] = phases.get(name, 0.0) + self.between(start, end)
        first = {}  # of a micro-batch
        for name, _, _, before, after, peak in self.found:
            first.setdefault(name, {"kept": after - before, "extra": peak - before})
        return {
            "seconds": self.between(self.found[0][1], self.found[-1][2]),
            "phases": phases,
            "bytes": first,
            "before": self.found[0][3],
            "peak": max(peak for *_, peak in self.found),
        }


def ours(step: Step, micro_batch: int, phases: Phases) -> Tensor:
    """`Trainer.distill`, without what it does on more processes or with another engine."""
    loss, totals = torch.zeros((), device=step.device), TokenTotals()
    with step.autocast():
        for part in chunks(len(step.responses), micro_batch):
            with phases.phase("layout"):
                student_batch = pack(step.student_prompts[part], step.responses[part], step.device)
                teacher_batch = pack(step.teacher_prompts[part], step.responses[part], step.device)
                assert_same_responses(student_batch, teacher_batch)
            with phases.phase("teacher"):
                teacher_hidden = step.teacher.hidden(teacher_batch)
            with phases.phase("student"):
                student_hidden = hidden_rows(step.backbone, student_batch)
            with phases.phase("loss"):
                tokens = ResponseTokens(student_batch.targets, student_batch.lengths)
                states = student_hidden.detach().requires_grad_()
                part_loss, stats = step.objective(states, step.head, teacher_hidden, None, tokens, step.sizes.tokens)
                with torch.autocast(torch.device(step.device).type, enabled=False):
                    part_loss.backward()
                totals.add(stats)
            with phases.phase("backward"), torch.autocast(torch.device(step.device).type, enabled=False):
                student_hidden.backward(states.grad)
            loss += part_loss.detach()
    return loss


def trl_dense(step: Step, micro_batch: int, phases: Phases, as_its_trainer: bool = True) -> Tensor:
    """`SDFTTrainer.compute_loss` with full logits. Accelerate gives it the logits of a bf16 model in fp32."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    keep = step.sizes.response

    def logits(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        with step.autocast():
            out = step.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep + 1).logits
        out = out.float() if as_its_trainer else out
        return out[:, :-1, :][:, -keep:, :] / step.settings.scoring_temperature

    def part_loss(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
        with phases.phase("student"):
            student = logits(student_ids)
        with phases.phase("teacher"), torch.no_grad(), step.model.disable_adapter():
            teacher = logits(teacher_ids)
        with phases.phase("loss"):
            per_token = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)
            return per_token.sum() / step.sizes.tokens

    return over_parts(step, micro_batch, phases, part_loss)


def trl_chunked(step: Step, micro_batch: int, phases: Phases) -> Tensor:
    """`DistillationTrainer`'s loss: the backbone's hidden states, and tiles of logits."""
    divergence, keep = entrants.trl_function("chunked"), step.sizes.response
    base = unwrap(step.model)
    head, backbone = base.get_output_embeddings().weight, base.base_model
    temperature = step.settings.scoring_temperature

    def hidden(ids: Tensor) -> Tensor:
        with step.autocast():
            out = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return out.last_hidden_state[:, :-1, :][:, -keep:, :].flatten(0, 1)

    def part_loss(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
        with phases.phase("student"):
            student = hidden(student_ids)
        with phases.phase("teacher"), torch.no_grad(), step.model.disable_adapter():
            teacher = hidden(teacher_ids)
        with phases.phase("loss"), step.autocast():
            valid = torch.ones(len(student), dtype=torch.bool, device=student.device)  # it leaves padding out
            rows = (student[valid], head, None, teacher[valid], head, None)
            per_token, _ = divergence(*rows, 0.0, temperature)
            return per_token.sum() / step.sizes.tokens

    return over_parts(step, micro_batch, phases, part_loss)


def over_parts(step: Step, micro_batch: int, phases: Phases, part_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """TRL's loop: one loss a micro-batch, one backward through all of it."""
    loss = torch.zeros((), device=step.device)
    for part in chunks(len(step.responses), micro_batch):
        with phases.phase("layout"):
            ids = step.padded(step.student_prompts, part), step.padded(step.teacher_prompts, part)
        value = part_loss(*ids)
        with phases.phase("backward"):
            value.backward()
        loss += value.detach()
    return loss


@contextlib.contextmanager
def attention_of(step: Step, name: str) -> Iterator[None]:
    """TRL's batches go through transformers' sdpa, ours through the packed form of it."""
    base = unwrap(step.model)
    if name not in (OURS, ONE_BY_ONE):
        base.set_attn_implementation("sdpa")
        yield
        return
    packed_attention.use_packed_attention(base)
    chosen = packed_attention.varlen_serves
    if name == ONE_BY_ONE:
        packed_attention.varlen_serves = lambda *_, **__: False
    try:
        yield
    finally:
        packed_attention.varlen_serves = chosen


VARIANTS: dict[str, Callable[[Step, int, Phases], Tensor]] = {
    OURS: ours,
    ONE_BY_ONE: ours,
    DENSE: trl_dense,
    DENSE_BF16: partial(trl_dense, as_its_trainer=False),
    CHUNKED: trl_chunked,
}


@contextlib.contextmanager
def layers_of(model: Any, setting: Setting) -> Iterator[None]:
    """Liger's kernels and gradient checkpointing where `setting` has them, and the layers as they were afterwards."""
    from transformers.models.qwen3 import modeling_qwen3

    base = unwrap(model)
    patched = ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")
    globals_before = {name: getattr(modeling_qwen3, name) for name in patched}
    own_before = {module: dict(module.__dict__) for module in base.modules()} if setting.liger else {}
    try:
        if setting.liger:
            use_liger_kernels(base)
        if setting.checkpointing:
            recompute_activations(model, "full")
        yield
    finally:
        if setting.checkpointing:
            base.gradient_checkpointing_disable()
        for name, value in globals_before.items():
            setattr(modeling_qwen3, name, value)
        for module, before in own_before.items():
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]


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
    stage.keep(weights=weights, parameters=sum(p.numel() for p in model.parameters()))
    stage.say(f"the model is there, {weights / GIB:.2f} GiB")
    stage.keep(packing=packing(step))
    groups, rows, failed = GROUPS, {}, {}
    if stage.dry:
        with layers_of(model, LIGER):  # they can be put in place, and taken out again
            failed[LIGER.name] = entrants.NEEDS_GPU
        groups = {PLAIN: GROUPS[PLAIN], PLAIN._replace(checkpointing=True): (OURS, CHUNKED)}
    for _ in range(BLOCKS):
        for setting, names in groups.items():
            try:
                with layers_of(model, setting):
                    for name in names:
                        one_block(stage, step, setting, name, rows, failed)
                        stage.keep(rows=rows, failed=failed)
            except Exception as error:  # the other settings go on
                failed[f"all of {setting.name}"] = first_line(error)
                stage.keep(failed=failed)
    equal_micro_batches(stage, step, rows, failed)
    stage.keep(rows=rows, failed=failed)


def packing(step: Step) -> str:
    """Whether packed sequences stay apart on this GPU."""
    try:
        packed_attention.use_packed_attention(unwrap(step.model))
        with step.autocast():
            packed_attention.check_packing(step.model)
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


def one_block(
    stage: Stage, step: Step, setting: Setting, name: str, rows: dict, failed: dict, micro_batch: int = 0
) -> None:
    """A block of steps of one variant, added to its row. The first one finds its micro-batch, unless it is given."""
    key = f"{name}; {setting.name}" + (f"; micro-batches of {micro_batch}" if micro_batch else "")
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
    row = rows.setdefault(key, {"variant": name, "setting": setting.name, "micro_batch": size, "steps": []})
    row["steps"] += found
    row.update(summary(row["steps"], step.sizes.tokens))
    stage.say(
        f"{key}: {1e3 * row['seconds']:.0f} ms, {row['tokens_per_second']:.0f} tokens/s, peak {row['peak'] / GIB:.1f} "
        f"GiB, micro-batches of {size}, loss {row['loss']:.4g}"
    )


def steps(stage: Stage, variant: Callable[[Phases], Tensor], step: Step) -> list[dict]:
    """Steps after those that compile and fill the allocator's cache."""
    found = []
    for number in range(WARM_UP if stage.dry else 0, WARM_UP + (1 if stage.dry else TIMED)):
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
        "tokens_per_second": tokens / seconds,
        "phases": {name: statistics.median(s["phases"][name] for s in found) for name in found[-1]["phases"]},
        "bytes": found[-1]["bytes"],
        "peak": max(s["peak"] for s in found),
        "loss": found[-1]["loss"],
    }


def equal_micro_batches(stage: Stage, step: Step, rows: dict, failed: dict) -> None:
    """Where TRL's dense loss had to take smaller micro-batches than ours: ours in those as well."""
    for setting in GROUPS:
        pair = [rows.get(f"{name}; {setting.name}") for name in (OURS, DENSE)]
        if None in pair or pair[0]["micro_batch"] == pair[1]["micro_batch"]:
            continue
        with layers_of(step.model, setting):
            one_block(stage, step, setting, OURS, rows, failed, pair[1]["micro_batch"])
        stage.keep(rows=rows, failed=failed)


def predictions(model_config: PreTrainedConfig, settings: ATESDConfig, sizes: Sizes) -> dict:
    """By micro-batch and checkpointing: the plan's bytes for the student's prompt and for the teacher's, and the
    seconds of `atesd scaling` for an H100, the teacher's for the teacher's prompt."""
    shape = model_shape(model_config, settings)
    found: dict[str, dict] = {}
    prompts = (sizes.student_prompt, sizes.teacher_prompt)
    for checkpointing in (False, True):
        for size in sizes.micro_batches:
            changed = replace(
                settings,
                gradient_checkpointing=checkpointing,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=sizes.problems // size,
            )
            plans = [plan_memory(shape, changed, p, "cuda") for p in prompts]
            times = [plan_time(shape, changed, p, H100, Layout()) for p in prompts]
            found[f"{size}, {'checkpointing' if checkpointing else 'all kept'}"] = {
                "memory": asdict(plans[0]),
                "peak": plans[0].weights + plans[0].gradients + plans[0].training,
                "dry_run_peak": plans[1].weights + plans[1].gradients + plans[1].training,
                "seconds": {"teacher": times[1].teacher, "student": times[0].student, "loss": times[0].loss},
            }
    return found


def table(result: dict) -> str:
    sizes = result["sizes"]
    lines = [
        f"Qwen3-1.7B's sizes, LoRA r 64, bf16: {sizes['problems']} problems, {sizes['response']:,} response tokens "
        f"each, prompts of {sizes['student_prompt']} tokens (student) and {sizes['teacher_prompt']} (teacher). Without "
        "rollouts and optimizer. TRL's backward includes that of the loss and of the head.",
    ]
    if result.get("packing", "kept apart") != "kept apart":
        lines += ["", f"Packed sequences: {result['packing']}"]
    rows = result["rows"].values()
    settings = dict.fromkeys(row["setting"] for row in rows)
    for setting in settings:
        own = result["rows"].get(f"{OURS}; {setting}")
        cells = [step_cells(row, own) for row in rows if row["setting"] == setting]
        names = ("ms", "response tokens/s", "of ours", "peak GiB", "micro-batch", "teacher", "student", "loss")
        lines += ["", markdown([setting, *names, "backward"], cells)]
    if result["failed"]:
        lines += ["", *(f"- {key}: {why}" for key, why in result["failed"].items())]
    cells = [c for row in rows if row["variant"] == OURS for c in prediction_cells(row, result)]
    if cells:
        lines += ["", "The plans beside this library's steps; seconds are `atesd scaling`'s for an H100:", ""]
        lines.append(markdown(["", "predicted", "measured", "measured / predicted"], cells))
    return "\n".join(lines)


def step_cells(row: dict, own: dict | None) -> list[str]:
    phases = row["phases"]
    return [
        row["variant"],
        f"{1e3 * row['seconds']:.0f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds'] / own['seconds']:.2f}x" if own else "",
        f"{row['peak'] / GIB:.1f}",
        str(row["micro_batch"]),
        *(f"{1e3 * phases[name]:.0f}" for name in ("teacher", "student", "loss", "backward")),
    ]


def prediction_cells(row: dict, result: dict) -> list[list[str]]:
    """What the plan says of this row's micro-batch and checkpointing, beside what was measured."""
    checkpointing = "checkpointing" if "checkpointing" in row["setting"] else "all kept"
    plan = result["predicted"].get(f"{row['micro_batch']}, {checkpointing}")
    if plan is None:
        return []
    memory, phases, name = plan["memory"], row["phases"], f"{row['setting']}, micro-batch {row['micro_batch']}"
    kept, planned = row["bytes"]["student"]["kept"], memory["activations"] + memory["autocast_copies"]
    pairs = [
        ("weights", memory["weights"] / GIB, result.get("weights", 0) / GIB, "GiB"),
        ("kept by the student's forward", planned / GIB, kept / GIB, "GiB"),
        ("loss", memory["loss_chunk"] / GIB, row["bytes"]["loss"]["extra"] / GIB, "GiB"),
        ("peak", plan["peak"] / GIB, row["peak"] / GIB, "GiB"),
        ("peak, as --dry-run plans", plan["dry_run_peak"] / GIB, row["peak"] / GIB, "GiB"),
        ("teacher", plan["seconds"]["teacher"], phases["teacher"], "s"),
        ("student and its backward", plan["seconds"]["student"], phases["student"] + phases["backward"], "s"),
        ("loss and its backward", plan["seconds"]["loss"], phases["loss"], "s"),
    ]
    return [
        [f"{name}: {what}", f"{a:.3g} {unit}", f"{b:.3g} {unit}", f"{b / a:.2f}" if a else ""]
        for what, a, b, unit in pairs
    ]


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
