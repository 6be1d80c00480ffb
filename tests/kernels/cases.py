"""Random teacher-student pairs and the comparison with float64 that every kernel test makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atesd_kernels import linear_divergence, planning, reference
from atesd_kernels.divergences import get_divergence

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "jeffreys",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
)
# every backend that can run here: the Triton ones on a GPU, or interpreted (see conftest.py)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# but for the compiled form of the torch backend, whose own test keeps the compiler's wait in one place
BACKENDS = [b for b in planning.BACKENDS if b != planning.COMPILED and planning.unavailable(b, DEVICE) is None]
INTERPRETED = DEVICE.type == "cpu"
# Triton's interpreter multiplies the bit patterns of bf16 operands
BF16_BACKENDS = [b for b in BACKENDS if b != "triton" or not INTERPRETED]


@dataclass
class Pair:
    """Inputs of `linear_divergence`: hidden states `[N, H]` and heads `[V, H]`, in the dtype under test.

    With `teacher_mix`, the teacher's are lists, of an entry for each view.
    """

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | list[Tensor]
    teacher_weight: Tensor | list[Tensor | None] | None = None
    teacher_mix: Tensor | None = None

    @property
    def tensors(self) -> tuple:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight


def size(backend: str) -> dict[str, int]:
    """Shape of a test's pair: an interpreted kernel takes a millisecond per operation of each of its programs."""
    return dict(n=3, h=24, v=261) if INTERPRETED and backend == "triton" else dict(n=67, h=48, v=1009)


def make_pair(
    n=67, h=48, v=1009, *, scale=0.05, dtype=torch.float32, shared=True, teacher_size=None, views=None, seed=0
) -> Pair:
    """A pair whose mean KL is roughly `2 * scale ** 2`, for scales up to about 0.5.

    `views` asks for several views of the teacher: for each the size of a head of its own, or None for the student's.
    """
    if views is not None:
        return make_views(n, h, v, scale=scale, dtype=dtype, views=views, seed=seed)
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    weight = randn(v, h) * 0.3
    student = randn(n, h)
    teacher = student.to(dtype).float() + scale * randn(n, h)
    teacher_weight = None
    if not shared:
        teacher_weight = weight.to(dtype).float() + 0.03 * scale * randn(v, h)
        if teacher_size is not None:  # further hidden units, which add as much as the others differ by
            teacher = torch.cat([teacher, randn(n, teacher_size - h)], 1)
            teacher_weight = torch.cat([teacher_weight, 0.3 * scale * randn(v, teacher_size - h)], 1)
    tensors = (student, weight, teacher, teacher_weight)
    return Pair(*(None if t is None else t.to(DEVICE, dtype) for t in tensors))


def make_views(n, h, v, *, scale, dtype, views, seed) -> Pair:
    """The student of `make_pair`, and views whose mixture, more of the first than there is, is as far from it as the
    teacher."""
    pair = make_pair(n, h, v, scale=scale, dtype=dtype, seed=seed)
    mix = torch.tensor([1.3, *[-0.3 / (len(views) - 1)] * (len(views) - 1)])
    scale = scale / mix.norm().item()
    g = torch.Generator().manual_seed(1000 + seed)
    found = []
    for size in views:
        states = pair.student_hidden.cpu().float() + scale * torch.randn(n, h, generator=g)
        head = None
        if size is not None:
            more = torch.randn(n, size - h, generator=g), 0.3 * scale * torch.randn(v, size - h, generator=g)
            states = torch.cat([states, more[0]], 1)
            head = pair.student_weight.cpu().float() + 0.03 * scale * torch.randn(v, h, generator=g)
            head = torch.cat([head, more[1]], 1).to(DEVICE, dtype)
        found.append((states.to(DEVICE, dtype), head))
    hidden, heads = map(list, zip(*found, strict=True))
    return Pair(pair.student_hidden, pair.student_weight, hidden, heads, mix.to(DEVICE))


def relative_l2(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def terms_of(pair, divergence, beta) -> Tensor:
    """Every entry's term, in float64: `(N, V)`."""
    s, t = reference.logit_pair(*pair.tensors, teacher_mix=pair.teacher_mix)
    return get_divergence(divergence, beta).term(t.log_softmax(-1), s.log_softmax(-1), beta)[0]


def clip_between_entries(pair, divergence, beta) -> float:
    """A clip that bites, in the middle of the widest gap around the 99.5th percentile of the terms.

    A clip's gradient jumps where a term equals it: an entry at the jump tests luck, not the code.
    """
    terms = terms_of(pair, divergence, beta).flatten().sort().values
    top = terms[int(0.99 * len(terms)) : int(0.998 * len(terms))]
    widest = (top[1:] - top[:-1]).argmax()
    return ((top[widest] + top[widest + 1]) / 2).item()


@dataclass
class Comparison:
    loss: float
    loss_error: float
    hidden_error: float
    weight_error: float | None
    bias_error: float | None


def compare(pair: Pair, *, trained_head=True, upstream: Tensor | None = None, backend="torch", **options) -> Comparison:
    """Loss and gradients of `linear_divergence` against the float64 oracle on the very same (rounded) inputs."""

    def leaf(tensor, dtype=None, wanted=True):
        return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(wanted)

    results = []
    for oracle in (False, True):
        dtype = torch.float64 if oracle else None
        hidden = leaf(pair.student_hidden, dtype)
        weight = leaf(pair.student_weight, dtype, trained_head)
        bias = leaf(options.get("student_bias"), dtype, trained_head)
        function = reference.linear_divergence if oracle else linear_divergence
        extra = {} if oracle else {"backend": backend, "chunk_bytes": options.get("chunk_bytes")}
        known = {k: v for k, v in options.items() if k not in ("chunk_bytes", "student_bias")}
        known["teacher_mix"] = pair.teacher_mix
        loss = function(hidden, weight, pair.teacher_hidden, pair.teacher_weight, student_bias=bias, **known, **extra)
        (loss if upstream is None else (loss * upstream.to(loss.dtype)).sum()).backward()
        results.append((loss.detach().double(), hidden.grad, weight.grad, None if bias is None else bias.grad))
    (loss, *grads), (true_loss, *true_grads) = results
    errors = [None if t is None or g is None else relative_l2(g, t) for g, t in zip(grads, true_grads, strict=True)]
    scale = true_loss.abs().mean()
    return Comparison(true_loss.mean().item(), ((loss - true_loss).abs().mean() / scale).item(), *errors)
