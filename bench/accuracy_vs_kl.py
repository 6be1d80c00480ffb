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

import torch

import atesd_kernels
from bench import entrants
from bench.entrants import OURS, Inputs, oracle, relative_error, value_and_grad
from bench.machine import RESULTS, markdown, percent, save
from bench.smollm_states import SmolLM2, teacher_at_kl

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEAN_KLS = (1e-4, 1e-3, 1e-2, 1e-1)
SEPARATE = f"{OURS}, separate heads"
COMPARED = (OURS, SEPARATE, "Liger chunked JSD", "dense torch (TRL)")


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
        for name in COMPARED:
            if name != SEPARATE and entrants.missing(name):
                continue
            got, got_grad = value_and_grad(function(name), x)
            loss_error = abs(got.double().item() - value) / value
            result[f"{name} {label}"] = {"gradient": relative_error(got_grad, grad), "loss": loss_error}
    return result


def run(problems: int, new_tokens: int) -> dict:
    model = SmolLM2(problems)
    replies = model.rollouts(new_tokens)
    student, weight = model.states(model.student_prompts, replies), model.weight()
    targets = torch.tensor([token for reply in replies for token in reply])
    rows = []
    for alpha in ALPHAS:
        teacher = model.states(model.teacher_prompts(alpha), replies)
        rows.append({"teacher": f"alpha = {alpha:g}", **measure(Inputs(student, weight, teacher, targets))})
        print(cells(rows[-1]), flush=True)
    for target in MEAN_KLS:
        moved = teacher_at_kl(student, teacher, weight, target)
        rows.append({"teacher": "alpha = 1, interpolated", **measure(Inputs(student, weight, moved, targets))})
        print(cells(rows[-1]), flush=True)
    missing = {name: entrants.missing(name) for name in COMPARED if name != SEPARATE and entrants.missing(name)}
    return {"tokens": len(student), "prompts": problems, "compared": list(COMPARED), "missing": missing, "rows": rows}


def columns(result: dict) -> list[str]:
    return [f"{name} {label}" for label in entrants.DTYPES for name in result["compared"]]


def cells(row: dict, wanted: list[str] | None = None) -> list[str]:
    wanted = wanted or [key for key, value in row.items() if isinstance(value, dict)]
    errors = [percent(row[key]["gradient"]) if key in row else "not installed" for key in wanted]
    return [
        row["teacher"],
        f"{row['mean_kl_bf16']:.2g}",
        *errors,
    ]


def table(result: dict) -> str:
    wanted = columns(result)
    ordered = sorted(result["rows"], key=lambda row: row["mean_kl_bf16"])
    return markdown(["teacher", "mean KL", *wanted], [cells(row, wanted) for row in ordered])


def plot(result: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    ordered = sorted(result["rows"], key=lambda row: row["mean_kl_bf16"])
    for name, colour in zip(result["compared"], ("tab:blue", "tab:cyan", "tab:orange", "tab:red"), strict=True):
        for label, style in zip(entrants.DTYPES, ("-", "--"), strict=True):
            points = [
                (row[f"mean_kl_{label}"], row[f"{name} {label}"]["gradient"])
                for row in ordered
                if f"{name} {label}" in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=f"{name} {label}")
    axes.set(xscale="log", yscale="log", xlabel="mean KL(teacher || student)", ylabel="relative L2 error of gradient")
    axes.axhline(1, color="grey", lw=0.5)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=140, bbox_inches="tight")


def main(problems: int = 8, new_tokens: int = 32) -> dict:
    result = run(problems, new_tokens)
    print(table(result))
    save("accuracy_vs_kl", result)
    plot(result, RESULTS / "accuracy_vs_kl.png")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32)
    main(**vars(parser.parse_args()))
