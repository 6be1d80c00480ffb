"""Who takes part: this library and its peers, as functions from the same inputs to the same scalar.

Each loss is a mean over tokens. The peers' own code runs wherever they have some: TRL's `generalized_jsd_loss` and the
chunked function of its `DistillationTrainer`, Liger's two fused JSDs, ORDA, CCE and flash-linear-attention. An entrant
that is not installed, or needs a GPU where there is none, is named, not dropped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import atesd_kernels
from atesd_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what is measured on this machine
OURS = "atesd_kernels"
DENSE = "dense torch (TRL)"
TRL_CHUNKED = "TRL chunked (DistillationTrainer)"
NEEDS_GPU = "needs a GPU"
LIGER_EAGER = "Liger chunked JSD, eager"
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

    def on(self, device: str) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))

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
        # TRL loops over the sequences of a micro-batch: rows as eight of them, not as thousands of one token
        batch = (8 if len(logits) % 8 == 0 else 1, -1)
        return -trl_function("logprobs")(logits.unflatten(0, batch), x.targets.unflatten(0, batch)).mean()
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
    if name == "chunked":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@cache
def compiled_dense(loss: str, dtype: torch.dtype) -> Callable:
    trl_function("logprobs" if loss == "logprobs" else "jsd")  # imported outside the traced region
    return torch.compile(lambda x: dense_trl(loss, x), dynamic=False)


def trl_chunked(loss: str, x: Inputs) -> Tensor:
    """What TRL's `DistillationTrainer` computes: tiles of fp32 logits, made again in the backward pass."""
    per_token, _ = trl_function("chunked")(x.student, x.weight, None, x.teacher, x.weight, None, BETA[loss])
    return per_token.mean()


def liger(loss: str, x: Inputs, compiled: bool = True) -> Tensor:
    """Liger's chunked JSD as it comes: compiled, 1,024 rows a chunk. It always forms the head's gradient too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[loss], temperature=1.0, compiled=compiled
    )
    return module(x.student, x.weight, x.teacher, x.weight, x.targets)


def liger_fused(loss: str, x: Inputs) -> Tensor:
    """Liger's JSD with its Triton kernels. It forms its gradients in the forward pass, wanted or not."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=BETA[loss])(x.student, x.weight, x.teacher, x.weight, None)


def orda(loss: str, x: Inputs, backend: str) -> Tensor:
    from orda_kernel import TiedTeacher, distillation_loss

    kind = {"kl_divergence": "skew_js", "kl_beta": BETA["jsd"]} if loss == "jsd" else {"kl_divergence": "forward"}
    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
    teacher = TiedTeacher(hidden=x.teacher)
    return distillation_loss(x.student, x.weight, x.targets, teacher, backend=backend, **kind, **weights).loss


def fla(loss: str, x: Inputs) -> Tensor:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(x.student, x.teacher, x.weight, x.weight.detach())


def cce(loss: str, x: Inputs, implementation: str) -> Tensor:
    """Its Triton kernels ("cce") need a GPU; "torch_compile" is the path it offers elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.student, x.weight, x.targets, impl=implementation, reduction="none").float().mean()


def liger_ce(loss: str, x: Inputs) -> Tensor:
    """Liger's fused linear cross-entropy. It forms its gradients in the forward pass, as its JSD does."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x.weight, x.student, x.targets)


def liger_scoring(loss: str, x: Inputs) -> Tensor:
    """Liger's log-probability of each token. On Hopper its kernels need CUTLASS's Python DSL."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(x.student, x.weight, x.targets).float().mean()


class Entrant(NamedTuple):
    module: str  # the package it needs
    losses: tuple[str, ...]
    function: Callable[[str, Inputs], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False  # waits for a compiler first


_KL, _CPU, _GPU = ("forward_kl", "jsd"), ("cpu",), ("cuda",)
_ENTRANTS = {
    OURS: Entrant("atesd_kernels", LOSSES, ours),
    f"{OURS}, compiled": Entrant("atesd_kernels", LOSSES, partial(ours, backend="torch_compiled"), compiled=True),
    DENSE: Entrant("trl", LOSSES, dense_trl),
    "dense torch, compiled": Entrant(
        "trl", LOSSES, lambda loss, x: compiled_dense(loss, x.student.dtype)(x), compiled=True
    ),
    TRL_CHUNKED: Entrant("trl", _KL, trl_chunked),
    "Liger chunked JSD": Entrant("liger_kernel", _KL, liger, compiled=True),
    LIGER_EAGER: Entrant("liger_kernel", _KL, partial(liger, compiled=False)),
    "Liger fused JSD": Entrant("liger_kernel", _KL, liger_fused, _GPU),
    "ORDA (torch path)": Entrant("orda_kernel", _KL, partial(orda, backend="torch"), _CPU),
    "ORDA": Entrant("orda_kernel", _KL, partial(orda, backend="triton"), _GPU),
    "flash-linear-attention": Entrant("fla", ("forward_kl",), fla, _GPU),
    "CCE (torch_compile path)": Entrant(
        "cut_cross_entropy", ("logprobs",), partial(cce, implementation="torch_compile"), _CPU, compiled=True
    ),
    "CCE": Entrant("cut_cross_entropy", ("logprobs",), partial(cce, implementation="cce"), _GPU),
    "Liger fused cross-entropy": Entrant("liger_kernel", ("logprobs",), liger_ce, _GPU),
    "Liger fused scoring": Entrant("liger_kernel", ("logprobs",), liger_scoring, _GPU),
}
COMPILED = {name for name, entrant in _ENTRANTS.items() if entrant.compiled}


def names(loss: str) -> list[str]:
    """Who has this loss, those who need another machine included; a path that only stands in for a GPU is left out
    where there is one."""
    return [name for name, e in _ENTRANTS.items() if loss in e.losses and (DEVICE in e.devices or e.devices == _GPU)]


def missing(name: str) -> str | None:
    """Why an entrant cannot take part, or None."""
    module, _, _, devices, _ = _ENTRANTS[name]
    if DEVICE not in devices:
        return NEEDS_GPU
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def entrant(name: str, loss: str) -> Loss:
    function = _ENTRANTS[name].function
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
