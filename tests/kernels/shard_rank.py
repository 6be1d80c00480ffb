"""One rank of `test_vocabulary_shards`: computes every case over its share of the head and writes down what it got.

    python -m tests.kernels.shard_rank RANK WORLD FOLDER

Separate because each rank is a process, and starting one takes far longer than a case: all cases run in one start.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from atesd_kernels import DivergenceTerm, exposure_logprobs, linear_divergence, linear_logprobs, linear_topk_divergence
from atesd_kernels.backends import tuning

from .shard_cases import (
    CASES,
    FEW_ROWS,
    OWN_PAIR,
    ROW_OPTIONS,
    TOPK_OPTIONS,
    Case,
    Own,
    computed,
    evaluate,
    shares,
    squared,
    whole_call,
)
from .topk_cases import TAILS

OWN = f"{Own.__module__}:{Own.__name__}"


class Rank:
    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.group = rank, world, dist.group.WORLD

    def share(self, tensor: Tensor) -> Tensor:
        return tensor.split(shares(len(tensor), self.world))[self.rank]

    def of_its_rows(self, options: dict[str, Any]) -> dict:
        """A batch whose rows lie on several ranks, the head being whole on each; sums over ranks at the end."""
        call = whole_call(Case({}, dict(mask="mask", token_weight="weight")))
        counted = call.options["mask"].sum()  # what a run would sum over ranks
        for tensors in (call.tensors, call.options):
            for name, tensor in tensors.items():
                if tensor is not None and "weight" not in name.replace("token_weight", ""):
                    tensors[name] = self.share(tensor)
        got = evaluate(linear_divergence, call, lambda t: t, True, num_tokens=counted, **options)
        for name in ("value", "weight_grad"):
            dist.all_reduce(got[name])
        return got

    def of_a_dtensor(self, function: Callable, **options) -> dict:
        """torch's own tensor parallelism: the head of a module, and its teacher's, as DTensors."""
        call = whole_call(Case(dict(shared=False), dict(student_bias="bias", teacher_bias="other")))
        mesh = init_device_mesh("cpu", (self.world,))
        v, h = call.tensors["student_weight"].shape
        head = nn.Linear(h, v)
        head.load_state_dict({"weight": call.tensors["student_weight"], "bias": call.options["student_bias"]})
        parallelize_module(head, mesh, ColwiseParallel())
        hidden = call.tensors["student_hidden"].clone().requires_grad_()
        replicated = DTensor.from_local(hidden, mesh, [Replicate()])
        if function is linear_logprobs:
            loss = linear_logprobs(replicated, head.weight, torch.arange(len(hidden)), bias=head.bias).mean()
        else:
            teacher = [
                distribute_tensor(t, mesh, [Shard(0)])
                for t in (call.tensors["teacher_weight"], call.options["teacher_bias"])
            ]
            loss = linear_divergence(
                replicated, head.weight, call.tensors["teacher_hidden"], teacher[0], student_bias=head.bias,
                teacher_bias=teacher[1], **options,
            )  # fmt: skip
        loss.backward()
        placements = [str(p) for grad in (head.weight.grad, head.bias.grad) for p in grad.placements]
        grads = {"weight_grad": head.weight.grad.full_tensor(), "bias_grad": head.bias.grad.full_tensor()}
        return {"value": loss.detach(), "hidden_grad": hidden.grad, **grads, "placements": placements}

    def of_a_view(self) -> tuple[Tensor, Tensor]:
        """With the head as its own teacher's, and with a view of it, in bf16, where shared heads round differently."""
        call = whole_call(Case(dict(dtype=torch.bfloat16)))
        hidden, head, teacher = (call.tensors[k] for k in ("student_hidden", "student_weight", "teacher_hidden"))
        head = distribute_tensor(head, init_device_mesh("cpu", (self.world,)), [Shard(0)])
        return linear_divergence(hidden, head, teacher), linear_divergence(hidden, head, teacher, head.detach())

    def of_topk(self, options: dict[str, Any], tail: str, backend: str) -> dict:
        """Against a teacher's top entries, some of which lie on each rank; without a group it is the whole head."""
        call = whole_call(Case(dict(n=13 if backend == "torch" else 7, scale=0.2), options))
        teacher, head = call.tensors["teacher_hidden"], call.tensors["student_weight"]
        call.options["tail"] = tail
        found = {}
        kinds = [("shards", self.share, self.group), ("whole", lambda tensor: tensor, None)]
        for name, cut, group in kinds[: 2 if self.rank == 0 else 1]:
            logprobs, ids = (teacher @ head.T).log_softmax(-1).topk(7)
            ids[3, 4:] = -1

            def loss(student_hidden, student_weight, ids=ids, logprobs=logprobs, **given):
                return linear_topk_divergence(student_hidden, student_weight, ids, logprobs, **given)

            student = {name: call.tensors[name] for name in ("student_hidden", "student_weight")}
            found[name] = evaluate(loss, replace(call, tensors=student), cut, True, group=group, backend=backend)
        return found

    def of_no_rows(self, backend: str) -> list[dict]:
        call = whole_call(Case(dict(n=0), dict(targets="targets", return_stats=True, student_bias="bias")))
        student = {"hidden": call.tensors["student_hidden"], "weight": call.tensors["student_weight"]}
        logprobs = replace(call, tensors=student, options={"targets": call.options["targets"]}, upstream=torch.ones(0))
        calls = ((linear_divergence, call), (linear_logprobs, logprobs))
        return [evaluate(loss, c, self.share, True, group=self.group, backend=backend) for loss, c in calls]

    def alone(self, backend: str) -> list[dict]:
        """In a group of this rank, and without a group."""
        groups = [dist.new_group([rank]) for rank in range(self.world)]
        call = whole_call(Case(dict(n=FEW_ROWS), dict(mask="mask", targets="targets", return_stats=True)))
        return [
            evaluate(linear_divergence, call, lambda tensor: tensor, True, group=group, backend=backend)
            for group in (groups[self.rank], None)
        ]

    def of_own_term(self, backend: str) -> dict:
        """A divergence of one's own. Each rank has made another number of objects with its name."""
        for _ in range(1 + self.rank):
            term = DivergenceTerm("squared", squared, triton="tests.kernels.own_term:squared")
        call = whole_call(Case(OWN_PAIR, dict(divergence=term)))
        return evaluate(linear_divergence, call, self.share, True, group=self.group, backend=backend)

    def of_exposure(self, backend: str) -> tuple[Tensor, Tensor]:
        """Over a DTensor head, and over the whole one."""
        call = whole_call(Case())
        hidden, head = call.tensors["student_hidden"][None], call.tensors["student_weight"]
        span = torch.arange(13)[None], torch.tensor([11]), torch.tensor([4])
        sharded = distribute_tensor(head, init_device_mesh("cpu", (self.world,)), [Shard(0)])
        return tuple(exposure_logprobs(hidden, weight, *span, backend=backend) for weight in (sharded, head))

    def compiled(self) -> dict[tuple[str, bool], tuple[Tensor, Tensor]]:
        """A caller compiled in one graph, and not; with a group, and with a DTensor."""
        call = whole_call(Case())
        hidden, head, teacher = (call.tensors[k] for k in ("student_hidden", "student_weight", "teacher_hidden"))
        sharded = distribute_tensor(head, init_device_mesh("cpu", (self.world,)), [Shard(0)])
        share = self.share(head)

        def by_group(hidden):
            return linear_divergence(hidden * 2, share, teacher, group=self.group) * 3

        def by_dtensor(hidden):
            return linear_divergence(hidden * 2, sharded, teacher) * 3

        found = {}
        for function in (by_group, by_dtensor):
            for how in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
                leaf = hidden.clone().requires_grad_()
                loss = how(leaf)
                loss.backward()
                found[function.__name__, how is function] = (loss.detach(), leaf.grad)
        return found

    def refusals(self) -> dict[str, str]:
        call = whole_call(Case())
        hidden, head, teacher = (call.tensors[k] for k in ("student_hidden", "student_weight", "teacher_hidden"))
        share, mesh = self.share(head), init_device_mesh("cpu", (self.world,))
        first = dist.new_group([0])  # on the other ranks: not a group
        other = dist.new_group(list(range(self.world)))
        outside = torch.full((13,), 101)
        by_hidden = distribute_tensor(head, mesh, [Shard(1)])
        by_rows = distribute_tensor(head, mesh, [Shard(0)])
        rows = distribute_tensor(hidden, mesh, [Shard(0)])
        none = head[:0] if self.rank == 1 else share
        own = hidden + self.rank
        attempts = {
            "own": lambda: linear_divergence(hidden, share, teacher, group=self.group, backend=OWN),
            "logprobs, own": lambda: linear_logprobs(hidden, share, outside, group=self.group, backend=OWN),
            "target": lambda: linear_divergence(hidden, share, teacher, targets=outside, group=self.group),
            "logprobs, target": lambda: linear_logprobs(hidden, share, outside, group=self.group),
            "a name": lambda: linear_divergence(hidden, share, teacher, group=self.group.group_name),
            "sharded by hidden": lambda: linear_divergence(hidden, by_hidden, teacher),
            "another group": lambda: linear_divergence(hidden, by_rows, teacher, group=other),
            "sharded rows": lambda: linear_divergence(rows, by_rows, teacher),
            "no row": lambda: linear_divergence(hidden, none, teacher, group=self.group),
            "other rows": lambda: linear_divergence(own, share, teacher, group=self.group),
            "more rows": lambda: linear_logprobs(
                hidden[self.rank :], share, outside[self.rank :] - 9, group=self.group
            ),
        }
        if self.rank > 0:
            attempts["not a member"] = lambda: linear_divergence(hidden, share, teacher, group=first)
        mask = torch.arange(13) < 12 - self.rank
        unlike = hidden.clone().requires_grad_(self.rank == 0)
        attempts |= {
            "other mask": lambda: linear_divergence(hidden, share, teacher, mask=mask, group=self.group),
            "logprobs, other mask": lambda: linear_logprobs(hidden, share, outside - 9, mask=mask, group=self.group),
            "other options": lambda: linear_divergence(
                hidden, share, teacher, temperature=1.0 + self.rank, group=self.group
            ),
            "one gradient": lambda: linear_divergence(unlike, share, teacher, group=self.group),
        }
        if "triton" in CASES:
            attempts["other GPUs"] = lambda: linear_divergence(
                hidden, share, teacher, group=self.group, backend="triton"
            )
        said = {}
        processors, tuning.num_processors = tuning.num_processors, lambda device: 132 - self.rank
        for name, attempt in attempts.items():
            try:
                attempt()
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"
        tuning.num_processors = processors
        # whoever refused left nothing half done: the ranks still agree
        said["after"] = f"{linear_divergence(hidden, share, teacher, group=self.group).item():.6f}"
        return said

    def exchanged(self) -> dict[str, int]:
        """Numbers this rank hands to collectives in a call, by the size of vocabulary and what is asked for."""
        sent = 0

        def counting(function: Callable) -> Callable:
            def counted(*args, **kwargs):
                nonlocal sent
                sent += next(a for a in reversed(args) if isinstance(a, Tensor)).numel()
                return function(*args, **kwargs)

            return counted

        kinds = ("all_", "broadcast", "reduce", "gather", "scatter", "send", "isend")
        originals = {k: f for k, f in vars(dist).items() if k.startswith(kinds) and callable(f)}
        for name, function in originals.items():
            setattr(dist, name, counting(function))
        found = {}
        everything = dict(targets="targets", return_stats=True, entry_clip=0.01)
        for v, backend in itertools.product((101, 1009), CASES):
            for trained, options in ((False, {}), (False, everything), (True, {})):
                call = whole_call(Case(dict(v=v, n=FEW_ROWS), options))
                hidden, head, teacher = (
                    call.tensors[k] for k in ("student_hidden", "student_weight", "teacher_hidden")
                )
                sent = 0
                hidden = hidden.clone().requires_grad_(trained)
                linear_divergence(hidden, self.share(head), teacher, group=self.group, backend=backend, **call.options)
                found[f"{backend}, {v}, gradient {trained}, {len(options)} options"] = sent
        for name, function in originals.items():
            setattr(dist, name, function)
        return found

    def answers(self) -> dict[str, Any]:
        return {
            "cases": {
                (backend, name): evaluate(
                    case.function, whole_call(case), self.share, case.trained_head, group=self.group, backend=backend
                )
                for backend, cases in CASES.items()
                for name, case in cases.items()
                if computed(backend, name, self.world)
            },
            "rows": {name: self.of_its_rows(options) for name, options in ROW_OPTIONS.items()},
            "topk": {
                (backend, name, tail): self.of_topk(o, tail, backend)
                for backend in CASES
                for name, o in TOPK_OPTIONS.items()
                for tail in TAILS
            },
            "no rows": {backend: self.of_no_rows(backend) for backend in CASES},
            "alone": {backend: self.alone(backend) for backend in CASES},
            "own term": {backend: self.of_own_term(backend) for backend in CASES},
            "dtensor": self.of_a_dtensor(linear_divergence),
            "dtensor, log-probabilities": self.of_a_dtensor(linear_logprobs),
            "dtensor, exposure": [self.of_exposure(backend) for backend in CASES],
            "dtensor, a view": self.of_a_view(),
            # the import of torch's compiler takes longer than all the rest: once
            **({"compiled": self.compiled()} if self.world == 2 else {}),
            "refusals": self.refusals(),
            "exchanged": self.exchanged(),
        }


def main(rank: str, world: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder).resolve()}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=60)
    )
    torch.save(Rank(int(rank), int(world)).answers(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
