"""Draws report.html, a self-contained page about one run. `atesd report RUN_DIR` draws it at any time, also during
the run.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from atesd.config import CONFIG_FILE, ATESDConfig
from atesd.config.load import read_own
from atesd.errors import AtesdError
from atesd.files import write_atomically
from atesd.reports import markup, plots
from atesd.reports.learned import as_card, read_comparison
from atesd.reports.markup import card, sample_cards, text
from atesd.reports.metrics import METRICS, SAMPLES, read_steps

REPORT = "report.html"
# title, {metric: label}, unit of the y-axis, description
LINES = (
    ("Loss", {"loss": "loss"}, "nats", "Mean divergence of the student from the teacher, clipped as configured."),
    (
        "Mismatch",
        {"mismatch": "mean", "mismatch_p95": "95th percentile"},
        "nats",
        "Divergence of a token before any clip: how far the reference moves the teacher from the student.",
    ),
    ("Probe NLL", {"probe_nll": "probe NLL"}, "nats per token", "Student NLL of references it never trains on."),
    (
        "Evaluation",
        {"eval_average": "Average@k", "eval_pass": "pass@k", "eval_maj": "maj@k"},
        "share of problems",
        "On held-out problems, k samples each; step 0 is before training.",
    ),
    ("Reward", {"reward": "reward"}, "", "Reward of the exposure decisions that were credited at that step."),
    (
        "Teacher-grounded score",
        {"grounded_score": "score"},
        "log-prob per token",
        "Teacher's log-probability of the part of the reference that it was not shown.",
    ),
    (
        "Repetition and clip",
        {"repetition": "repeated 4-grams", "clip_fraction": "taken by the clip"},
        "share",
        "Share of 4-grams that repeat an earlier one; share of the divergence that the clip removes.",
    ),
    ("Right answers", {"verifier_reward": "right"}, "share", "Share of the step's rollouts that the verifier accepts."),
    ("Response length", {"response_length": "tokens"}, "tokens", "Mean over the step's rollouts."),
    (
        "Entropy",
        {"student_entropy": "student", "teacher_entropy": "teacher"},
        "nats",
        "Entropy of the next token on the rollouts. A student entropy near 0 means collapse.",
    ),
)


class ReportError(AtesdError, ValueError):
    """A folder is not a run directory."""


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draws RUN_DIR/report.html from the current config.yaml, metrics.jsonl and samples.jsonl. Returns its path.

    Raises:
        ReportError: `run_dir` is not a run directory.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        raise ReportError(f"{run_dir} is no run directory: it has no {METRICS}. Give a folder that a run made")
    rows, samples = (read_steps(run_dir / name)[0] for name in (METRICS, SAMPLES))
    config_file = run_dir / CONFIG_FILE
    config = read_own(config_file) if config_file.is_file() else {}
    path = run_dir / REPORT
    write_atomically(path, run_page(run_dir.resolve().name, rows, samples, config, read_comparison(run_dir)))
    return path


def run_page(
    name: str,
    rows: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    config: dict[str, Any],
    learned: dict[str, Any] | None = None,
) -> str:
    total = config.get("max_steps")
    done = rows[-1]["step"] if rows else 0
    state = "no step is finished yet" if not rows else f"step {done}" + (f" of {total}" if total else "")
    model, data, policy = (config.get(key, "") for key in ("model_name_or_path", "dataset_name", "exposure_policy"))
    charts = [
        card(title, description, plots.line_plot(rows, keys, unit))
        for title, keys, unit, description in LINES
        if any(key in row for row in rows for key in keys)
    ]
    charts.append(card("Seconds by phase", "Where a step's time goes.", plots.phases_plot(rows)))
    exposure = card(
        "Exposure",
        "Share of the reference that the teacher reads: alpha by step, over the policy's density.",
        plots.exposure_plot(rows),
    )
    body = (
        f"<h1>{text(name)}</h1><p>{text(state)} · {text(model)} · {text(data)} · exposure policy: {text(policy)}</p>"
        f"{as_card(learned) if learned else ''}"
        f'<div class="tiles">{"".join(tiles(rows))}</div>'
        f"<h2>Training</h2>{exposure}"
        f'<div class="grid">{"".join(charts)}</div>'
        f"<h2>Samples</h2>{sample_cards(samples, SAMPLES)}"
        f"<h2>Configuration</h2>{config_table(config)}"
    )
    return markup.page(name, body)


def tiles(rows: list[dict[str, Any]]) -> list[str]:
    """Returns tiles with key numbers: first and last loss, probe NLL and alpha, and the cost of a step."""
    facts: list[tuple[str, str]] = []
    for key, label in (("loss", "loss"), ("probe_nll", "probe NLL"), ("alpha", "alpha")):
        _, values = plots.series(rows, key)
        if len(values):
            facts.append((f"{values[0]:.3g} → {values[-1]:.3g}", f"{label}, first → last"))
    if rows and rows[-1].get("beta_a") and rows[-1].get("beta_b"):
        facts.append((f"Beta({rows[-1]['beta_a']:.2f}, {rows[-1]['beta_b']:.2f})", "policy at the last step"))
    middle = {key: sorted(plots.series(rows, key)[1]) for key in ("seconds_step", "tokens_per_second")}
    for key, label in (("seconds_step", "median seconds per step"), ("tokens_per_second", "median tokens per second")):
        if middle[key]:
            facts.append((f"{middle[key][len(middle[key]) // 2]:.3g}", label))
    _, peaks = plots.series(rows, "peak_memory_bytes")
    if len(peaks):
        facts.append((f"{peaks.max() / 2**30:.2f} GiB", "peak memory"))
    _, skipped = plots.series(rows, "skipped")
    if skipped.any():
        facts.append((f"{int((skipped > 0).sum())}", "skipped steps (non-finite)"))
    return [f'<div class="card tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in facts]


def config_table(config: dict[str, Any]) -> str:
    """Returns a table of all settings. Those that differ from their default come first, highlighted."""
    known = {field.name: field for field in fields(ATESDConfig)}
    changed = [key for key, value in config.items() if key not in known or known[key].default != value]
    rows = [
        f'<tr class="{"changed" if key in changed else ""}"><td>{text(key)}</td><td>{text(config[key])}</td>'
        f"<td>{text(known[key].metadata['help'] if key in known else '')}</td></tr>"
        for key in [*changed, *(key for key in config if key not in changed)]
    ]
    if not rows:
        return f"<p>There is no {CONFIG_FILE}.</p>"
    shown = f"<table>{''.join(rows[: len(changed)])}</table>"
    rest = f"<details><summary>{len(rows) - len(changed)} settings at their defaults</summary>"
    return f'<div class="card">{shown}{rest}<table>{"".join(rows[len(changed) :])}</table></details></div>'
