"""Error of the hidden-state gradient against float64, over the mean KL between teacher and student.

    python -m bench.accuracy_vs_kl [--problems 8] [--new_tokens 32]

SmolLM2-135M answers gsm_symbolic problems (sampled at T = 1.1: the student's own tokens, as in training); teachers read
the same tokens after a prompt that exposes alpha of the reference solution. Further teachers lie on the line from the
student's hidden states through the alpha = 1 teacher's, `h_s + s (h_t - h_s)`, with s chosen for a mean KL. Forward KL
at temperature 1, mean over tokens. Every entrant is compared with float64 on the same inputs: those rounded to bf16 for
the bf16 entrants, fp32 for the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import atesd_kernels
from bench import entrants
from bench.entrants import COMPILED, DEVICE, NEEDS_GPU, OURS, Inputs, oracle, relative_error, value_and_grad
from bench.machine import markdown, percent, save
from bench.plots import Line, log_log
from bench.progress import say
from bench.smollm_states import SmolLM2, teacher_at_kl

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEAN_KLS = (1e-4, 1e-3, 1e-2, 1e-1)
SEPARATE = f"{OURS}, separate heads"


def compared() -> list[str]:
    """Everyone who does not wait for a compiler and has a path for this machine, installed or not."""
    others = [n for n in entrants.names("forward_kl") if n not in COMPILED and entrants.missing(n) != NEEDS_GPU]
    return [OURS, SEPARATE, *(name for name in others if name != OURS)]


def function(name: str):
    if name == SEPARATE:  # equal heads in different storage: the path of a teacher that is another model
        return lambda x: atesd_kernels.linear_divergence(x.student, x.weight, x.teacher, x.weight.clone())
    return entrants.entrant(name, "forward_kl")


def measure(inputs: Inputs) -> dict:
    result = {}
    for label, dtype in entrants.DTYPES.items():
        x = inputs.to(dtype)
        value, grad = oracle("forward_kl", x)
        result[f"mean_kl_{label}"] = value
        for name in compared():
            if name != SEPARATE and entrants.missing(name):
                continue
            got, got_grad = value_and_grad(function(name), x)
            loss_error = abs(got.double().item() - value) / value
            result[f"{name} {label}"] = {"gradient": relative_error(got_grad, grad), "loss": loss_error}
    return result


def run(
    problems: int, new_tokens: int, alphas: tuple[float, ...] = ALPHAS, mean_kls: tuple[float, ...] = MEAN_KLS
) -> dict:
    """`alphas` end with the one whose teacher is moved to the `mean_kls`. Saved after every teacher."""
    say("the student's rollouts and hidden states")
    model = SmolLM2(problems)
    replies = model.rollouts(new_tokens)
    student, weight = model.states(model.student_prompts, replies), model.weight()
    targets = torch.tensor([token for reply in replies for token in reply])
    names = compared()
    missing = {name: entrants.missing(name) for name in names if name != SEPARATE and entrants.missing(name)}
    rows: list[dict] = []
    result = {"tokens": len(student), "prompts": problems, "compared": names, "missing": missing, "rows": rows}

    def add(label: str, teacher: Tensor) -> None:
        say(f"gradient errors, {label}")
        rows.append({"teacher": label, **measure(Inputs(student, weight, teacher, targets).on(DEVICE))})
        save("accuracy_vs_kl", result)

    for alpha in alphas:
        teacher = model.states(model.teacher_prompts(alpha), replies)
        add(f"alpha = {alpha:g}", teacher)
    for target in mean_kls:
        add(f"alpha = {alpha:g}, interpolated", teacher_at_kl(student, teacher, weight, target))
    return result


def table(result: dict) -> str:
    """A row for each entrant in each precision, a column for each teacher."""
    ordered = sorted(result["rows"], key=lambda row: row["mean_kl_bf16"])
    header = [f"{row['mean_kl_bf16']:.2g}{exposure(row)}" for row in ordered]
    rows = []
    for label in entrants.DTYPES:
        for name in result["compared"]:
            key = f"{name} {label}"
            rows.append([key, *(percent(r[key]["gradient"]) if key in r else "not installed" for r in ordered)])
    return markdown(["gradient error at mean KL", *header], rows)


def exposure(row: dict) -> str:
    return "" if "interpolated" in row["teacher"] else f" ({row['teacher'].replace('alpha', 'α')})"


def plot(result: dict, path: Path, source: str) -> None:
    ordered = sorted(result["rows"], key=lambda row: row["mean_kl_bf16"])
    lines = []
    for label in entrants.DTYPES:
        for name in result["compared"]:
            key = f"{name} {label}"
            points = [(row[f"mean_kl_{label}"], row[key]["gradient"]) for row in ordered if key in row]
            if points:
                lines.append(Line(key, name, points, dashed=label == "fp32"))
    log_log([("", lines)], "mean KL(teacher || student)", ["relative L2 error of the gradient"], path, source)


def main(problems: int = 8, new_tokens: int = 32, **teachers) -> dict:
    result = run(problems, new_tokens, **teachers)
    print(table(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    main(**vars(parser.parse_args()))
