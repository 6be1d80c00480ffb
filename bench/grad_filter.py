"""What `grad_filter=eps` of backend "triton_tiled" costs and saves, on real hidden states.

    python -m bench.grad_filter [--problems 8] [--new_tokens 32]

SmolLM2-135M's own answers to gsm_symbolic problems, the teacher reading the whole solution; forward KL, fp32. Which
tiles are dropped depends on the probabilities and the tile alone, so it is computed densely, without a GPU: a share of
the second pass's products, the hidden-state gradient's relative L2 error, and what the loss loses.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from atesd_kernels.tuning import TILES
from bench.machine import markdown, percent
from bench.smollm_states import SmolLM2

TILE = TILES["sm_90"]


def measure(student: Tensor, teacher: Tensor, weight: Tensor, eps: float) -> list[str]:
    q, p = ((h @ weight.T).softmax(-1) for h in (student, teacher))
    rows, columns = len(q) // TILE.block_m * TILE.block_m, q.shape[1] // TILE.block_n * TILE.block_n
    q, p = q[:rows, :columns], p[:rows, :columns]
    tiles = torch.maximum(p, q).view(-1, TILE.block_m, columns // TILE.block_n, TILE.block_n).amax((1, 3))
    kept = (tiles > eps).repeat_interleave(TILE.block_m, 0).repeat_interleave(TILE.block_n, 1)
    gradient, term = q - p, p * (p.log() - q.log()) - (p - q)
    whole = gradient @ weight[:columns]
    error = ((gradient * kept) @ weight[:columns] - whole).norm() / whole.norm()
    lost = 1 - (term * kept).sum() / term.sum()
    return [f"{eps:g}", percent((tiles <= eps).float().mean().item()), percent(error.item()), percent(lost.item())]


def main(problems: int = 8, new_tokens: int = 32) -> None:
    model = SmolLM2(problems)
    replies = model.rollouts(new_tokens)
    states = (model.states(prompts, replies) for prompts in (model.student_prompts, model.teacher_prompts(1.0)))
    student, teacher = states
    rows = [measure(student, teacher, model.weight(), eps) for eps in (1e-5, 1e-4, 1e-3, 1e-2)]
    print(markdown(["grad_filter", "tiles skipped", "gradient error", "loss too low by"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    main(**vars(parser.parse_args()))
