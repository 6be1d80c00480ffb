"""report.html: what happened in a run, on one page that needs no other file. Works on a run that is still going.

Separate from the trainer so that `atesd report RUN_DIR` draws it for any run, at any time.
"""

from __future__ import annotations

import html
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from atesd import report_plots as plots
from atesd.config import CONFIG_FILE, ATESDConfig
from atesd.files import write_whole
from atesd.metrics import METRICS, SAMPLES, read_jsonl

REPORT = "report.html"
# title, {metric: label}, unit of the axis, what it tells
LINES = (
    ("Loss", {"loss": "loss"}, "nats", "Mean divergence of the student from the teacher, clipped as configured."),
    (
        "Mismatch",
        {"mismatch": "mean", "mismatch_p95": "95th percentile"},
        "nats",
        "Divergence of a token before any clip: how far what the teacher read has moved it from the student.",
    ),
    ("Probe NLL", {"probe_nll": "probe NLL"}, "nats a token", "The student alone, on references it never trains on."),
    (
        "Evaluation",
        {"eval_average": "Average@k", "eval_pass": "pass@k", "eval_maj": "maj@k"},
        "share of problems",
        "On held-out problems, k samples each; step 0 is before training.",
    ),
    ("Reward", {"reward": "reward"}, "", "Of the exposure decisions that were paid at that step."),
    (
        "Teacher-grounded score",
        {"grounded_score": "score"},
        "log-prob a token",
        "How likely the teacher finds the part of the reference that it was not shown.",
    ),
    (
        "Repetition and clip",
        {"repetition": "repeated 4-grams", "clip_fraction": "taken by the clip"},
        "share",
        "Of the responses' 4-grams, those that came before; of the divergence, what the clip takes away.",
    ),
    ("Right answers", {"verifier_reward": "right"}, "share", "Of the step's rollouts, as the verifier sees them."),
    ("Response length", {"response_length": "tokens"}, "tokens", "Mean over the step's rollouts."),
    (
        "Entropy",
        {"student_entropy": "student", "teacher_entropy": "teacher"},
        "nats",
        "Of the next token, on the rollouts. A student's that falls to 0 is a collapse.",
    ),
)
CSS = """
:root{--ink:#1f2430;--dim:#5b6472;--line:#e3e7ee;--blue:#2f6db5}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f9;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:34px 0 10px}h3{font-size:14px;margin:0}
p{margin:2px 0;color:var(--dim);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:10px;margin-top:18px}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:18px;font-weight:600;white-space:nowrap}.tile span{color:var(--dim);font-size:12px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:12px;margin-top:12px}
@media(max-width:520px){.grid{grid-template-columns:1fr}}
img{width:100%;height:auto;display:block;margin-top:6px}
table{border-collapse:collapse;width:100%;font-size:13px}
td,th{padding:4px 10px 4px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td:nth-child(2){font-family:ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
tr.changed td:nth-child(2){color:var(--blue);font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f8f9fb;border-radius:6px;padding:8px 10px;margin:4px 0 10px;
font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace}
summary{cursor:pointer;color:var(--blue);font-size:13px}.samples{display:grid;gap:12px}
"""


class ReportError(ValueError):
    """A folder that no report can be drawn for."""


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draws RUN_DIR/report.html from config.yaml, metrics.jsonl and samples.jsonl, as far as the run has come.

    Raises:
        ReportError: `run_dir` is not the directory of a run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        raise ReportError(f"{run_dir} is no run directory: it has no {METRICS}. Give a folder that a run made")
    rows = read_jsonl(run_dir / METRICS)
    samples = read_jsonl(run_dir / SAMPLES)
    config_file = run_dir / CONFIG_FILE
    config = yaml.safe_load(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    path = run_dir / REPORT
    write_whole(path, page(run_dir.resolve().name, rows, samples, config))
    return path


def page(name: str, rows: list[dict[str, Any]], samples: list[dict[str, Any]], config: dict[str, Any]) -> str:
    total = config.get("max_steps")
    done = rows[-1]["step"] if rows else 0
    state = "no step is finished yet" if not rows else f"step {done}" + (f" of {total}" if total else "")
    model, data, policy = (config.get(key, "") for key in ("model_name_or_path", "dataset_name", "exposure_policy"))
    charts = [
        card(title, told, plots.line_plot(rows, keys, unit))
        for title, keys, unit, told in LINES
        if any(key in row for row in rows for key in keys)
    ]
    charts.append(card("Seconds by phase", "Where a step's time goes.", plots.phases_plot(rows)))
    exposure = card(
        "Exposure",
        "How much of the reference the teacher reads: each step's alpha, on the distribution it was drawn from.",
        plots.exposure_plot(rows),
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(name)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head><body><main>'
        f"<h1>{text(name)}</h1><p>{text(state)} · {text(model)} · {text(data)} · exposure policy: {text(policy)}</p>"
        f'<div class="tiles">{"".join(tiles(rows))}</div>'
        f"<h2>Training</h2>{exposure}"
        f'<div class="grid">{"".join(charts)}</div>'
        f'<h2>Samples</h2><div class="samples">{"".join(sample_cards(samples))}</div>'
        f"<h2>Configuration</h2>{config_table(config)}</main></body></html>"
    )


def tiles(rows: list[dict[str, Any]]) -> list[str]:
    """The run in a few numbers: first to last value of what should change, and the cost of a step."""
    facts: list[tuple[str, str]] = []
    for key, label in (("loss", "loss"), ("probe_nll", "probe NLL"), ("alpha", "alpha")):
        _, values = plots.series(rows, key)
        if len(values):
            facts.append((f"{values[0]:.3g} → {values[-1]:.3g}", f"{label}, first → last"))
    if rows and rows[-1].get("beta_a") and rows[-1].get("beta_b"):
        facts.append((f"Beta({rows[-1]['beta_a']:.2f}, {rows[-1]['beta_b']:.2f})", "policy at the last step"))
    middle = {key: sorted(plots.series(rows, key)[1]) for key in ("seconds_step", "tokens_per_second")}
    for key, label in (("seconds_step", "seconds a step, median"), ("tokens_per_second", "tokens a second, median")):
        if middle[key]:
            facts.append((f"{middle[key][len(middle[key]) // 2]:.3g}", label))
    _, peaks = plots.series(rows, "peak_memory_bytes")
    if len(peaks):
        facts.append((f"{peaks.max() / 2**30:.2f} GiB", "peak memory"))
    _, skipped = plots.series(rows, "skipped")
    if skipped.any():
        facts.append((f"{int((skipped > 0).sum())}", "skipped steps (non-finite)"))
    return [f'<div class="card tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in facts]


def card(title: str, told: str, image: str | None) -> str:
    picture = f'<img alt="{text(title)}" src="{image}">' if image else "<p>Nothing measured yet.</p>"
    return f'<div class="card"><h3>{text(title)}</h3><p>{text(told)}</p>{picture}</div>'


def sample_cards(samples: list[dict[str, Any]], count: int = 4) -> list[str]:
    """The first sample and the latest ones: short values in the headline, long ones as text."""
    chosen = samples if len(samples) <= count else [samples[0], *samples[-(count - 1) :]]
    cards = []
    for sample in chosen:
        short = {k: v for k, v in sample.items() if not isinstance(v, str) or (0 < len(v) <= 40 and "\n" not in v)}
        head = " · ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())
        long = {k: v or "(nothing)" for k, v in sample.items() if k not in short}
        body = "".join(f"<p>{text(k)}</p><pre>{text(v)}</pre>" for k, v in long.items())
        cards.append(f'<div class="card"><h3>{text(head)}</h3>{body}</div>')
    return cards or ["<p>No sample yet.</p>"]


def config_table(config: dict[str, Any]) -> str:
    """Every setting; those that differ from the default stand out, and stand first."""
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


def text(value: object) -> str:
    return html.escape(str(value))
