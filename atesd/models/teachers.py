"""The teacher: the student's network, run under `no_grad` with the weights of `kind`.

| kind   | with LoRA                     | full fine-tuning                     |
|--------|-------------------------------|--------------------------------------|
| frozen | the base, adapter disabled    | a copy of the initial weights        |
| ema    | an average of the adapter     | an average of all weights            |
| live   | the student itself            | the student itself                   |

`ema` is an exponential moving average. No second model object exists: the teacher's weights are a dict of tensors that
replaces the student's during a forward. Under FSDP2 or ZeRO-3 the dict is sharded like the model, so each rank stores
and swaps only its local shards. The head is the exception: the loss needs it unsharded, so the dict holds a full copy.
The teacher that is a model of its own, kind `model`, is in other_teacher.py. One behind a server, kind `vllm_server`,
is in the room served_teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from atesd.models.adapters import adapter_layers, adapter_off, has_plain_switch, with_attribute
from atesd.models.batching import PackedBatch, hidden_rows
from atesd.models.scoring import token_logprobs
from atesd.models.top_entries import TopEntries
from atesd.parallel.sharding import gather_tensors, is_sharded, local_shard, reshard, shard_like
from atesd_kernels.integrations.head import HeadSpec, hidden_states_and_head, unwrap

KINDS = ("frozen", "ema", "live")


class AnyTeacher(Protocol):
    """What a run asks of its teacher: `Teacher`, `other_teacher.OtherTeacher`, or `served_teacher.ServedTeacher`.

    Attributes:
        kind: `config.teacher`; a checkpoint knows it.
        remote: whether it answers requests. It may then fail in a step, and is told of all responses of a step first.
        head: the teacher's head, on the loss's device; None if the loss reads none.
        shares_head: whether that is the student's.
    """

    kind: str
    remote: bool

    @property
    def head(self) -> HeadSpec | None: ...
    @property
    def shares_head(self) -> bool: ...
    def prepare(self, batch: PackedBatch) -> None:
        """Take note of all responses of a step, whose `hidden` comes in parts. Only for a remote one."""

    def hidden(self, batch: PackedBatch) -> Tensor | TopEntries:
        """What the loss takes as `teacher_hidden`: `(N, hidden)`, or a server's top entries."""

    def target_logprobs(self, batch: PackedBatch, chunk_bytes: int | None = None) -> Tensor:
        """Log-probability, at temperature 1, of each response token of `batch`, `(N,)`."""

    def update(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedTeacher:
    """Base of teachers whose weights a run neither changes nor saves."""

    kind: str

    def update(self) -> None:
        """No-op: it does not learn."""

    def state_dict(self) -> dict[str, Any]:
        """Returns no weights: a run that goes on finds them where the first start did."""
        return {"kind": self.kind, "values": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)


def check_kind(state: dict[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise ValueError(f"the checkpoint was made with teacher={state['kind']!r}, not {kind!r}.")


class Teacher:
    """Computes hidden states with the teacher's weights.

    Args:
        model: the student, with or without peft.
        kind: one of `KINDS`.
        ema_decay: weight of the old average in each update.
        bf16: forwards run under bfloat16 autocast. A frozen copy then stores the matrices of linear layers in
            bfloat16, to which autocast rounds them anyway. Embeddings and norms keep their dtype. This is lossless.
    """

    remote = False

    def __init__(self, model: nn.Module, kind: str, *, ema_decay: float = 0.999, bf16: bool = False):
        if kind not in KINDS:
            raise ValueError(f"teacher is {kind!r}; known: {', '.join(KINDS)}.")
        self.model, self.kind, self.decay = model, kind, ema_decay
        self.backbone, self.student_head = hidden_states_and_head(model)
        base = unwrap(model)
        # the module: `self.backbone` may be a wrapper's forward
        self.backbone_module = backbone = getattr(base, base.base_model_prefix)
        reshard(model)
        self.disable_adapter = kind == "frozen" and hasattr(model, "disable_adapter")
        self.adapter_layers = adapter_layers(model) if self.disable_adapter and has_plain_switch(model) else []
        self.modules = list(model.modules())  # cached: walking them takes longer than launching a layer
        self.sources: dict[str, Tensor] = {}  # trained parameters, by name in the backbone or "head.*"
        if kind != "live" and not self.disable_adapter:
            self.sources = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
            known = {id(p) for p in self.sources.values()}
            for name in ("weight", "bias"):  # a tied head is already included, as the embedding
                p = getattr(self.student_head, name)
                if p is not None and p.requires_grad and id(p) not in known:
                    self.sources[f"head.{name}"] = p
        matrices = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Linear)}
        self.values = {
            name: local_shard(p).to(torch.bfloat16, copy=True)
            if bf16 and kind == "frozen" and id(p) in matrices
            else local_shard(p).clone()
            for name, p in self.sources.items()
        }

    @property
    def head(self) -> HeadSpec:
        """The head with the teacher's weights."""
        by_source = {id(self.sources[name]): value for name, value in self.values.items()}
        head = self.student_head
        weight = by_source.get(id(head.weight), head.weight)
        return replace(head, weight=weight, bias=by_source.get(id(head.bias), head.bias))

    @property
    def shares_head(self) -> bool:
        """Whether student and teacher use the same head tensors. The loss's delta path is exact only then."""
        return self.head.weight is self.student_head.weight and self.head.bias is self.student_head.bias

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Returns `(N, hidden)`: the hidden states that predict the response tokens of `batch`."""
        return hidden_rows(self.backbone_call, batch)

    def prepare(self, batch: PackedBatch) -> None:
        """No-op: it is asked as it comes."""

    def target_logprobs(self, batch: PackedBatch, chunk_bytes: int | None = None) -> Tensor:
        """Returns the log-probability, at temperature 1, of each response token of `batch`, `(N,)`."""
        return token_logprobs(self.backbone_call, self.head, batch, chunk_bytes)

    @torch.no_grad()
    def backbone_call(self, **inputs: Any) -> Any:
        """Runs the backbone with the teacher's weights, without gradient or dropout."""
        values = {name: value for name, value in self.values.items() if not name.startswith("head.")}
        with with_attribute(self.modules, "training", False), self.without_adapter():
            if values and is_sharded(self.model):
                with swapped_weights(self.model, self.sources, values):
                    return self.backbone(**inputs)
            if values:
                return torch.func.functional_call(self.backbone_module, values, (), inputs)
            return self.backbone(**inputs)

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Context that disables the adapter if the base model is the teacher; otherwise a no-op."""
        if self.adapter_layers:
            return adapter_off(self.adapter_layers)
        return self.model.disable_adapter() if self.disable_adapter else contextlib.nullcontext()

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average: `average <- decay * average + (1 - decay) * student`. Call after each optimizer step.
        No-op unless `kind` is `ema`."""
        if self.kind == "ema":
            for name, value in self.values.items():
                value.lerp_(local_shard(self.sources[name]), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages. A frozen copy is not saved: it equals the model as loaded, before training."""
        values = {name: value for name, value in self.values.items() if name not in self.tied_head_names()}
        if self.kind == "ema" and any(hasattr(p, "ds_id") for p in self.sources.values()):  # ZeRO-3: no shapes
            with swapped_weights(
                self.model, self.sources, {n: v for n, v in values.items() if not n.startswith("head.")}
            ):
                values |= {name: gather_tensors(p) for name, p in self.sources.items() if hasattr(p, "ds_id")}
        return {"kind": self.kind, "values": values if self.kind == "ema" else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        for name, value in state["values"].items():
            self.values[name].copy_(shard_like(value, self.sources[name]))
        for name, embedding in self.tied_head_names().items():
            if state["values"]:
                self.values[name].copy_(state["values"][embedding])

    def tied_head_names(self) -> dict[str, str]:
        """Returns {name of the unsharded head copy: name of its tied, sharded embedding}; {} if there is none."""
        base = unwrap(self.model)
        head, sharded = base.get_output_embeddings(), {id(p): name for name, p in self.sources.items()}
        name = sharded.get(id(head.weight))
        return {"head.weight": name} if name and "head.weight" in self.values else {}


@contextlib.contextmanager
def swapped_weights(model: nn.Module, shards: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """Copies `values` into the local shards (FSDP2 or ZeRO-3) within the context, and restores them on exit."""
    reshard(model)
    kept = {name: local(local_shard(shards[name])) for name in values}
    own = {name: shard.clone() for name, shard in kept.items()}
    for name, value in values.items():
        kept[name].copy_(local(value))
    try:
        yield
    finally:
        reshard(model)
        for name, shard in own.items():
            local(local_shard(shards[name])).copy_(shard)


def local(value: Any) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
