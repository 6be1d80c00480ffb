"""Who takes part: this library and its peers, as functions from the same inputs to the same scalar.

Each loss is a mean over tokens. The peers' own code runs wherever they have some: TRL's `generalized_jsd_loss`, Liger's
`LigerFusedLinearJSDLoss`, ORDA's and CCE's CPU paths. An entrant that is not installed is named, not dropped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import atesd_kernels
from atesd_kernels import reference

OURS = "atesd_kernels"
OURS_COMPILED = "atesd_kernels, compiled"
LOSSES = ("forward_kl", "jsd", "entry_clip", "logprobs")
BETA = {"forward_kl": 0.0, "jsd": 0.5}
ENTRY_CLIP = 0.05
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Inputs(NamedTuple):
    student: Tensor  # [N, H]
    weight: Tensor  # [V, H], the head both models share, frozen
    teacher: Tensor  # [N, H]
    targets: Tensor  # [N]

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.student.to(dtype), self.weight.to(dtype), self.teacher.to(dtype), self.targets)

    def rows(self, rows: slice) -> Inputs:
        return Inputs(self.student[rows], self.weight, self.teacher[rows], self.targets[rows])


Loss = Callable[[Inputs], Tensor]


def ours(loss: str, x: Inputs, backend: str = "auto") -> Tensor:
    if loss == "logprobs":
        return -atesd_kernels.linear_logprobs(x.student, x.weight, x.targets, backend=backend).mean()
    name = "jsd" if loss == "jsd" else "forward_kl"
    clip = ENTRY_CLIP if loss == "entry_clip" else None
    return atesd_kernels.linear_divergence(
        x.student, x.weight, x.teacher, divergence=name, beta=0.5, entry_clip=clip, backend=backend
    )


def dense_trl(loss: str, x: Inputs) -> Tensor:
    """Whole logits in the inputs' dtype, then TRL's own function (or, for the clip, OPSD's line after F.kl_div)."""
    logits = F.linear(x.student, x.weight)
    if loss == "logprobs":
        return -trl_function("logprobs")(logits, x.targets).mean()
    with torch.no_grad():
        teacher_logits = F.linear(x.teacher, x.weight)
    if loss == "entry_clip":
        terms = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="none", log_target=True)
        return terms.clamp(max=ENTRY_CLIP).sum(-1).mean()
    return trl_function("jsd")(logits, teacher_logits, beta=BETA[loss])


@cache
def trl_function(name: str) -> Callable:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if name == "logprobs":
        from trl.trainer.utils import selective_log_softmax

        return selective_log_softmax
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@cache
def compiled_dense(loss: str, dtype: torch.dtype) -> Callable:
    trl_function("logprobs" if loss == "logprobs" else "jsd")  # imported outside the traced region
    return torch.compile(lambda x: dense_trl(loss, x), dynamic=False)


def liger(loss: str, x: Inputs, compiled: bool = True) -> Tensor:
    """Liger's chunked JSD as it comes: compiled, 1,024 rows a chunk. It always forms the head's gradient too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[loss], temperature=1.0, compiled=compiled
    )
    return module(x.student, x.weight, x.teacher, x.weight, x.targets)


def orda(loss: str, x: Inputs) -> Tensor:
    from orda_kernel import TiedTeacher, distillation_loss

    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
    return distillation_loss(
        x.student,
        x.weight,
        x.targets,
        TiedTeacher(hidden=x.teacher),
        kl_divergence="forward",
        backend="torch",
        **weights,
    ).loss


def cce(loss: str, x: Inputs) -> Tensor:
    """Its Triton kernels need a GPU; this is the path it offers elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.student, x.weight, x.targets, impl="torch_compile", reduction="none").float().mean()


# name -> (module it needs, losses it has, function)
_KL, _ALL = ("forward_kl", "jsd"), LOSSES
_ENTRANTS: dict[str, tuple[str, tuple[str, ...], Callable[[str, Inputs], Tensor]]] = {
    OURS: ("atesd_kernels", _ALL, ours),
    OURS_COMPILED: ("atesd_kernels", _ALL, lambda loss, x: ours(loss, x, "torch_compiled")),
    "dense torch (TRL)": ("trl", _ALL, dense_trl),
    "dense torch, compiled": ("trl", _ALL, lambda loss, x: compiled_dense(loss, x.student.dtype)(x)),
    "Liger chunked JSD": ("liger_kernel", _KL, liger),
    "Liger chunked JSD, eager": ("liger_kernel", _KL, lambda loss, x: liger(loss, x, compiled=False)),
    "ORDA (torch path)": ("orda_kernel", ("forward_kl",), orda),
    "CCE (torch_compile path)": ("cut_cross_entropy", ("logprobs",), cce),
}
# These wait for a compiler first.
COMPILED = {OURS_COMPILED, "dense torch, compiled", "Liger chunked JSD", "CCE (torch_compile path)"}
# Peers without a CPU path; their rows belong to a machine with a GPU.
GPU_ONLY = {"Liger fused JSD": _KL, "flash-linear-attention": ("forward_kl",)}


def names(loss: str) -> list[str]:
    return [name for name, (_, losses, _) in _ENTRANTS.items() if loss in losses]


def missing(name: str) -> str | None:
    """Why an entrant cannot take part, or None."""
    module = _ENTRANTS[name][0]
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def entrant(name: str, loss: str) -> Loss:
    function = _ENTRANTS[name][2]
    return lambda x: function(loss, x)


def present(loss: str, compiled: bool = True) -> dict[str, Loss]:
    return {n: entrant(n, loss) for n in names(loss) if missing(n) is None and (compiled or n not in COMPILED)}


def value_and_grad(function: Loss, x: Inputs) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the student's hidden states."""
    student = x.student.detach().requires_grad_()
    value = function(x._replace(student=student))
    value.backward()
    return value.detach(), student.grad


def oracle(loss: str, x: Inputs, chunk: int = 128) -> tuple[float, Tensor]:
    """Loss and gradient in float64, rows in chunks."""
    n, total, grads = len(x.student), 0.0, []
    weight = x.weight.double()
    for start in range(0, n, chunk):
        rows = x.rows(slice(start, start + chunk))
        student = rows.student.double().requires_grad_()
        value = _oracle_sum(loss, student, weight, rows) / n
        total += value.item()
        grads.append(torch.autograd.grad(value, student)[0])
    return total, torch.cat(grads)


def _oracle_sum(loss: str, student: Tensor, weight: Tensor, x: Inputs) -> Tensor:
    if loss == "logprobs":
        return -reference.linear_logprobs(student, weight, x.targets).sum()
    name, clip = ("jsd" if loss == "jsd" else "forward_kl"), (ENTRY_CLIP if loss == "entry_clip" else None)
    return reference.linear_divergence(
        student, weight, x.teacher, divergence=name, beta=0.5, entry_clip=clip, reduction="sum"
    )


def relative_error(grad: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return ((grad.double() - exact).norm() / exact.norm()).item()
