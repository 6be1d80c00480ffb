"""The loss against a teacher's top K entries, beside what TRL and verl compute: dense logits, then a gather.

    python -m bench.topk_speed [--tokens 1024] [--k 64] [--rounds 3] [--dtype fp32]

Forward + backward to the hidden states, frozen head. The teacher is the pair's own, of which each entrant sees the K
most likely tokens. TRL's loss has a bucket for the rest, whose mass is 1 minus the listed; its functions run as
installed. verl's is the sum of p (log p - log q) over the K ids. It is written out here, because verl's module imports
its whole trainer. The error is that of the gradient against float64, on the first rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from atesd_kernels import linear_topk_divergence, reference
from bench import timing
from bench.entrants import DTYPES, OURS, relative_error
from bench.machine import markdown, percent, save
from bench.progress import say
from bench.shapes import HERE, TOKENS, Shape, inputs

BUCKET, IGNORED = "bucket", "ignore"
CHECKED_ROWS = 64


class Known(NamedTuple):
    student: Tensor  # [N, H]
    weight: Tensor  # [V, H], frozen
    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K], fp32, as a server sends them


def ours(tail: str, x: Known) -> Tensor:
    return linear_topk_divergence(*x, tail=tail)


def trl(tail: str, x: Known) -> Tensor:
    """As `SDFTTrainer` does with a teacher on a server."""
    add_tail_bucket, compute_divergence = trl_functions()
    student = F.linear(x.student, x.weight).log_softmax(-1).gather(-1, x.ids)
    return compute_divergence(add_tail_bucket(student), add_tail_bucket(x.logprobs), 0.0).mean()


@cache
def trl_functions() -> tuple[Callable, Callable]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft.loss_utils import add_tail_bucket, compute_divergence

    return add_tail_bucket, compute_divergence


def verl(tail: str, x: Known) -> Tensor:
    """verl's loss, but with the log-softmax in fp32. verl keeps the logits' dtype, so in bf16 this is more exact than
    verl's own, and moves more bytes."""
    student = F.linear(x.student, x.weight).float().log_softmax(-1).gather(-1, x.ids)
    return (x.logprobs.exp() * (x.logprobs - student)).sum(-1).mean()


def entrants() -> dict[tuple[str, str], Callable[[Known], Tensor]]:
    found = {(OURS, BUCKET): partial(ours, BUCKET), (OURS, IGNORED): partial(ours, IGNORED)}
    if importlib.util.find_spec("trl"):
        found["TRL: dense, then gather", BUCKET] = partial(trl, BUCKET)
    return found | {("verl: dense, then gather", IGNORED): partial(verl, IGNORED)}


def known(shape: Shape, tokens: int, k: int, dtype: torch.dtype) -> Known:
    """The pair of `shapes.inputs`. The teacher's logits are made in pieces of rows."""
    x = inputs(shape, tokens).to(dtype)
    pieces = [(h.float() @ x.weight.float().T).log_softmax(-1).topk(k) for h in x.teacher.split(256)]
    logprobs, ids = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Known(x.student, x.weight, ids, logprobs)


def gradient(function: Callable[[Known], Tensor], x: Known) -> Tensor:
    student = x.student.detach().requires_grad_()
    function(x._replace(student=student)).backward()
    return student.grad


def error(function: Callable[[Known], Tensor], tail: str, x: Known) -> float:
    rows = Known(x.student[:CHECKED_ROWS], x.weight, x.ids[:CHECKED_ROWS], x.logprobs[:CHECKED_ROWS])
    student = rows.student.double().requires_grad_()
    reference.linear_topk_divergence(student, *rows[1:], tail=tail).backward()
    return relative_error(gradient(function, rows), student.grad)


def run(
    tokens: int = TOKENS // 2, k: int = 64, rounds: int = 3, dtypes: tuple[str, ...] = tuple(DTYPES),
    shape: Shape = HERE[0],
) -> dict:  # fmt: skip
    rows: list[dict] = []
    for dtype in dtypes:
        x = known(shape, tokens, k, DTYPES[dtype])
        jobs, errors = {}, {}
        for (name, tail), function in entrants().items():
            say(f"top {k} of a teacher, {dtype}: {name}, {tail}, first call")
            errors[name, tail] = error(function, tail, x)
            jobs[name, tail] = partial(gradient, function, x)
            jobs[name, tail]()
        for (name, tail), seconds in timing.interleave(jobs, rounds).items():
            row = {"entrant": name, "tail": tail, "dtype": dtype, "error": errors[name, tail]}
            rows.append({**row, **timing.summary(seconds)})
    return {"tokens": tokens, "k": k, "shape": shape._asdict(), "rows": rows}


def table(result: dict) -> str:
    shape = result["shape"]
    note = (
        f"K = {result['k']}, N = {result['tokens']:,}, H = {shape['hidden']:,}, V = {shape['vocab']:,}; median (range)."
    )
    rows = [
        [f"{r['entrant']}, tail {r['tail']}, {r['dtype']}", timing.with_spread(r), percent(r["error"])]
        for r in result["rows"]
    ]
    return f"{note}\n\n{markdown(['loss', 'forward + backward', 'gradient error'], rows)}"


def main(**options) -> dict:
    result = run(**options)
    print(table(result))
    save("topk_speed", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=TOKENS // 2)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    arguments = vars(parser.parse_args())
    only = arguments.pop("dtype")
    main(**arguments, dtypes=(only,) if only else tuple(DTYPES))
