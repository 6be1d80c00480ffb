"""Attention on a CPU beside torch's kernel: of one training sequence in float32, and of one decoded token in bf16.

    python -m bench.attention_speed [--rounds 11]

With SmolLM2-135M's heads. torch's kernel is measured twice in training: as it comes, and in the context of a training
step, which lets oneDNN multiply for it too. Ours is measured above the length up to which it is used, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atesd.models.attention.causal import causal_attention
from atesd.models.attention.one_token import one_token_forward
from atesd.models.memory import FreedMemory
from atesd.models.precision import fast_fp32_products
from atesd_kernels.backends import matmul
from bench import timing
from bench.machine import markdown, save
from bench.progress import say

HEADS, GROUPS, HEAD_DIM = 9, 3, 64
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536)
PHASES = ("forward", "forward + backward")
DECODED, BATCH = "a token after them, bf16, 8 responses", 8
CPU = torch.device("cpu")
OURS, FUSED = "atesd", "torch, fused"


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal_attention(query, key, value, HEAD_DIM**-0.5)


def attend(function: Callable, in_step: bool, states: list[Tensor], of_out: Tensor | None) -> None:
    with fast_fp32_products(CPU) if in_step else nullcontext(), torch.set_grad_enabled(of_out is not None):
        out = function(*states)
        if of_out is not None:
            torch.autograd.grad(out, states, of_out)


def states_of(length: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value as a model's projections lay them out, and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    *states, of_out = (torch.randn(1, length, n, HEAD_DIM, generator=generator).transpose(1, 2) for n in heads)
    return [x.requires_grad_() for x in states], of_out


def decoding(length: int) -> dict[str, Callable[[], Tensor]]:
    heads = ((HEADS, 1), (GROUPS, length), (GROUPS, length))
    states = [torch.randn(BATCH, n, count, HEAD_DIM, dtype=torch.bfloat16) for n, count in heads]
    return {
        FUSED: partial(scaled_dot_product_attention, *states, enable_gqa=True),
        OURS: partial(one_token_forward, *states, None, None),
    }


def measured(jobs: dict[str, Callable[[], object]], rounds: int, length: int, phase: str) -> list[dict]:
    for job in jobs.values():
        job()
    return [
        {"entrant": name, "length": length, "phase": phase, **timing.summary(seconds)}
        for name, seconds in timing.interleave(jobs, rounds).items()
    ]


def run(lengths: tuple[int, ...] = LENGTHS, rounds: int = 11) -> dict:
    functions = {FUSED: partial(attend, fused, False), f"{FUSED}, in a step": partial(attend, fused, True)}
    if matmul.onednn_keeps_fp32():
        functions[OURS] = partial(attend, ours, True)
    rows = []
    for length in lengths:
        states, of_out = states_of(length)
        for phase in PHASES:
            say(f"attention of {length} tokens, {phase}")
            jobs = {
                name: partial(function, states, None if phase == PHASES[0] else of_out)
                for name, function in functions.items()
            }
            rows += measured(jobs, rounds, length, phase)
        rows += measured(decoding(length), rounds, length, DECODED)
    return {"lengths": list(lengths), "rounds": rounds, "rows": rows}


def table(result: dict) -> str:
    found = {(r["length"], r["phase"], r["entrant"]): r for r in result["rows"]}
    names = list(dict.fromkeys(r["entrant"] for r in result["rows"]))
    rows = []
    for length, phase in dict.fromkeys((r["length"], r["phase"]) for r in result["rows"]):
        cells = [found.get((length, phase, name)) for name in names]
        rows.append(
            [f"{length} tokens, {phase}", *("-" if cell is None else timing.with_spread(cell) for cell in cells)]
        )
    note = (
        f"{HEADS} heads of {HEAD_DIM}, {GROUPS} of keys; training: fp32, causal; median (range) of {result['rounds']}."
    )
    return f"{note}\n\n{markdown(['sequence', *names], rows)}"


def main(**options) -> dict:
    result = run(**options)
    print(table(result))
    save("attention_speed", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=11)
    FreedMemory(keep=True)  # of the whole process, so not in `run`
    main(**vars(parser.parse_args()))
