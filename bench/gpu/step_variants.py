"""The steps stage 6 measures, ours and TRL's, and what a step is measured with.

Separate from step.py, which decides what runs when: here is what each variant does in a step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.models.adapters import adapter_layers, inputs_cast_by_autocast
from atesd.models.attention import packed
from atesd.models.batching import assert_same_responses, chunks, hidden_rows, pack
from atesd.models.loading import use_liger_kernels
from atesd.models.recompute import recompute_activations
from atesd.models.teachers import Teacher
from atesd.objectives import ResponseTokens, TokenTotals, make_objective
from atesd_kernels.integrations.head import hidden_states_and_head, unwrap
from bench import entrants

OURS, ONE_BY_ONE = "atesd", "atesd, sdpa one call a sequence"
DENSE, DENSE_BF16 = "TRL dense loss (SDFTTrainer)", "TRL dense loss, its logits left in bf16"
CHUNKED = "TRL chunked loss (DistillationTrainer)"


class Sizes(NamedTuple):
    problems: int
    response: int  # tokens of the longest
    student_prompt: int
    teacher_prompt: int
    micro_batches: tuple[int, ...]  # tried from the left
    shortest: int = 0  # response: lengths are spread evenly from here to `response`; 0 is one length for all

    @property
    def lengths(self) -> list[int]:
        """Of the responses, in an order that mixes long and short ones."""
        spread = torch.linspace(self.shortest or self.response, self.response, self.problems).long().tolist()
        return [*spread[::2], *spread[1::2]]

    @property
    def tokens(self) -> int:
        """The step's response tokens."""
        return sum(self.lengths)

    @property
    def workload(self) -> str:
        of = f"{self.shortest:,} to {self.response:,}" if self.shortest else f"{self.response:,}"
        return f"responses of {of} tokens"


class Setting(NamedTuple):
    """What the layers do, for all variants of a group alike."""

    liger: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        layers = "Liger's layers" if self.liger else "transformers' layers"
        return layers + (", checkpointing" if self.checkpointing else "")


class PaddedBatch(NamedTuple):
    """A micro-batch of TRL's: ids and attention mask `(batch, length)` of student and teacher."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    response_mask: Tensor  # (batch, longest response)


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
        responses = tokens(self.sizes.response)
        self.responses = [r[:length] for r, length in zip(responses, self.sizes.lengths, strict=True)]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.backbone, self.head = hidden_states_and_head(self.model)
        self.adapter_layers = adapter_layers(self.model)
        self.teacher = Teacher(self.model, "frozen", bf16=True)
        self.objective = make_objective(self.settings)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def padded(self, part: slice) -> PaddedBatch:
        """Responses are padded on the right to the longest, as TRL's trainers do. Prompts have one length."""
        responses = self.responses[part]
        longest = max(map(len, responses))
        padding = [longest - len(r) for r in responses]
        mask = torch.tensor([[1] * len(r) + [0] * n for r, n in zip(responses, padding, strict=True)])

        def with_prompts(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
            rows = [p + r + [0] * n for p, r, n in zip(prompts[part], responses, padding, strict=True)]
            seen = torch.cat([mask.new_ones(len(rows), len(prompts[0])), mask], 1)
            return torch.tensor(rows, device=self.device), seen.to(self.device)

        return PaddedBatch(with_prompts(self.student_prompts), with_prompts(self.teacher_prompts), mask.to(self.device))


class Phases:
    """Seconds of a step's phases, the host's and the GPU's, and the memory at their ends. Bytes are 0 on a CPU."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.found: list[tuple[str, Any, Any, int, int, int]] = []
        self.host: dict[str, float] = {}  # seconds until a phase's last launch, waits for the GPU included
        self.host_start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        before, start, host_start = self.allocated(), self.now(), time.perf_counter()
        yield
        self.host[name] = self.host.get(name, 0.0) + time.perf_counter() - host_start
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
        host_seconds = time.perf_counter() - self.host_start
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
            "host_seconds": host_seconds,
            "host_phases": self.host,
            "bytes": first,
            "before": self.found[0][3],
            "peak": max(peak for *_, peak in self.found),
        }


def ours(step: Step, micro_batch: int, phases: Phases) -> Tensor:
    """`Trainer.distill`, without what it does on more processes or with another engine."""
    loss, totals = torch.zeros((), device=step.device), TokenTotals()
    with step.autocast(), inputs_cast_by_autocast(step.adapter_layers):
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

    def logits(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        with step.autocast():
            out = step.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep + 1).logits
        out = out.float() if as_its_trainer else out
        return out[:, :-1, :][:, -keep:, :] / step.settings.scoring_temperature

    def total(student: Tensor, teacher: Tensor, response_mask: Tensor) -> Tensor:
        per_token = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)
        return (per_token * response_mask).sum()

    return over_parts(step, micro_batch, phases, logits, total)


def trl_chunked(step: Step, micro_batch: int, phases: Phases) -> Tensor:
    """`DistillationTrainer`'s loss: the backbone's hidden states, and tiles of logits."""
    divergence = entrants.trl_function("chunked")
    base = unwrap(step.model)
    head, backbone = base.get_output_embeddings().weight, base.base_model
    temperature = step.settings.scoring_temperature

    def hidden(ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        with step.autocast():
            out = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state[:, :-1, :][:, -keep:, :].flatten(0, 1)

    def total(student: Tensor, teacher: Tensor, response_mask: Tensor) -> Tensor:
        with step.autocast():
            valid = response_mask.flatten().bool()  # it leaves padding out
            rows = (student[valid], head, None, teacher[valid], head, None)
            per_token, _ = divergence(*rows, 0.0, temperature)
            return per_token.sum()

    return over_parts(step, micro_batch, phases, hidden, total)


def over_parts(
    step: Step,
    micro_batch: int,
    phases: Phases,
    forward: Callable[[Tensor, Tensor, int], Tensor],
    total: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """TRL's loop: one loss a micro-batch, one backward through all of it.

    `forward` gives what a loss reads of ids, mask and the longest response; `total` is the loss's sum over tokens.
    """
    loss = torch.zeros((), device=step.device)
    for part in chunks(len(step.responses), micro_batch):
        with phases.phase("layout"):
            batch = step.padded(part)
        keep = batch.response_mask.shape[1]
        with phases.phase("student"):
            student = forward(*batch.student, keep)
        with phases.phase("teacher"), torch.no_grad(), step.model.disable_adapter():
            teacher = forward(*batch.teacher, keep)
        with phases.phase("loss"):
            value = total(student, teacher, batch.response_mask) / step.sizes.tokens
        del student, teacher  # autograd keeps what backward needs
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
    packed.use_packed_attention(base)
    chosen = packed.varlen_serves
    if name == ONE_BY_ONE:
        packed.varlen_serves = lambda *_, **__: False
    try:
        yield
    finally:
        packed.varlen_serves = chosen


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
