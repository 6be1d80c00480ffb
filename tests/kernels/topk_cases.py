"""A teacher's top K entries for a pair of `cases`, and the comparison of `linear_topk_divergence` with float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atesd_kernels import linear_topk_divergence, reference

from .cases import Comparison, Pair, make_pair, relative_l2, size

TAILS = ("bucket", "renormalise", "ignore")


@dataclass
class Known:
    """Inputs of `linear_topk_divergence`: student `[N, H]` and `[V, H]`, teacher `[N, K]`."""

    student_hidden: Tensor
    student_weight: Tensor
    ids: Tensor
    logprobs: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.ids, self.logprobs


def known(backend: str, k: int = 12, scale: float = 0.07, *, options: dict | None = None, **pair) -> Known:
    """What a server would send of a pair's teacher, in fp32. Later rows have fewer entries, padded with -1."""
    found = make_pair(**{**size(backend), "scale": scale, "shared": False, **pair})
    logprobs, ids = teacher(found, options or {}).topk(k)
    fewer = torch.arange(k, device=ids.device) >= k - torch.arange(len(ids), device=ids.device)[:, None] % 3
    return Known(found.student_hidden, found.student_weight, ids.masked_fill(fewer, -1), logprobs.float())


def teacher(pair: Pair, options: dict) -> Tensor:
    scaling = {k: options.get(k) for k in ("student_bias", "softcap")}
    logits = reference.logits(
        pair.teacher_hidden, pair.teacher_weight, scaling["student_bias"], scaling["softcap"],
        options.get("temperature", 1.0),
    )  # fmt: skip
    return logits.log_softmax(-1)


def compare(
    case: Known, *, trained_head: bool = True, upstream: Tensor | None = None, backend: str = "torch", **options
) -> Comparison:
    """Loss and gradients against the float64 oracle on the same (rounded) inputs."""

    def leaf(tensor, dtype, wanted=True):
        return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(wanted)

    results = []
    for function, dtype in ((linear_topk_divergence, None), (reference.linear_topk_divergence, torch.float64)):
        hidden, weight = leaf(case.student_hidden, dtype), leaf(case.student_weight, dtype, trained_head)
        bias = leaf(options.get("student_bias"), dtype, trained_head)
        given = {k: v for k, v in options.items() if k not in ("chunk_bytes", "student_bias")}
        if dtype is None:
            given |= {"backend": backend, "chunk_bytes": options.get("chunk_bytes")}
        loss = function(hidden, weight, case.ids, case.logprobs, student_bias=bias, **given)
        (loss if upstream is None else (loss * upstream.to(loss.dtype)).sum()).backward()
        results.append((loss.detach().double(), hidden.grad, weight.grad, None if bias is None else bias.grad))
    (loss, *grads), (true, *true_grads) = results
    errors = [None if t is None or g is None else relative_l2(g, t) for g, t in zip(grads, true_grads, strict=True)]
    return Comparison(true.mean().item(), ((loss - true).abs().mean() / true.abs().mean()).item(), *errors)
