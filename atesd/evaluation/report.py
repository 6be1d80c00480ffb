"""Renders evaluation results as markdown and as one self-contained HTML page.

Needs no model, so reports can be rendered again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.evaluation import plots
from atesd.evaluation.files import RESULTS, SAMPLES, SETTINGS, EvalError, read_record, read_samples
from atesd.files import write_atomically
from atesd.reports.markup import card, html_table, markdown_table, page, sample_cards, text
from atesd.reports.printout import Printout, Table

PARTS = ("metrics", "problems")  # of results.json
CELL = "td:nth-child(2){font-family:inherit}td,th{white-space:nowrap}"
DESCRIPTIONS = {
    "average": "share of correct samples, mean over problems",
    "pass": "unbiased probability that at least one of j samples is correct",
    "maj": "share of problems whose most frequent answer is correct",
    "response_length": "tokens, mean over samples",
    "truncated": "share of samples cut off at max_completion_length",
    "no_answer": "share of samples without an answer",
}


@dataclass(frozen=True)
class EvalRun:
    """A finished evaluation: its name and folder, and the contents of `eval_config.json` and `results.json`."""

    name: str
    folder: Path
    record: dict[str, Any]
    results: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        return self.results["metrics"]


def load_run(folder: str | Path) -> EvalRun:
    """Loads a finished evaluation.

    Raises:
        EvalError: `folder` holds no evaluation, or an unfinished one, or a damaged file.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise EvalError(f"{folder} is no evaluation: it has no {SETTINGS}. Give a folder that atesd eval made")
    if not (folder / RESULTS).is_file():
        raise EvalError(f"the evaluation in {folder} is not finished: run its atesd eval command again to resume")
    record = read_record(folder / SETTINGS, ("settings", "problems", "versions"))
    return EvalRun(folder.resolve().name, folder, record, read_record(folder / RESULTS, PARTS))


def write_reports(folder: Path) -> Path:
    """Writes `results.md` and `results.html` of a finished evaluation. Returns `folder`."""
    run = load_run(folder)
    write_atomically(folder / "results.md", markdown_report(run))
    write_atomically(folder / "results.html", html_report(run))
    return folder


def printout(folder: Path) -> Printout:
    """Returns what the terminal shows of a finished evaluation: its results, without the settings."""
    run = load_run(folder)
    header, rows = metric_table(run)
    report, warned = folder / "results.html", warning_lines(run)
    return Printout(
        [headline(run), Table(run.name, rows, header), *warned, f"report: {report}"],
        {**run.results, "settings": run.settings, "warnings": warned, "folder": str(folder), "report": str(report)},
    )


def markdown_report(run: EvalRun) -> str:
    header, rows = metric_table(run)
    parts = [f"# {run.name}", headline(run), markdown_table(header, rows)]
    parts += [f"**{warning}**" for warning in warning_lines(run)]
    settings = [[name, f"`{json.dumps(value)}`"] for name, value in run.settings.items()]
    parts += ["## Settings", markdown_table(["setting", "value"], settings)]
    parts += [f"Prompt: `{json.dumps(run.record['prompt'])}`", f"Versions: {versions(run)}"]
    return "\n\n".join(parts) + "\n"


def html_report(run: EvalRun) -> str:
    header, rows = metric_table(run)
    settings = [[name, json.dumps(value)] for name, value in run.settings.items()]
    average = next(iter(run.metrics))
    by_problem = {name: row[average] for name, row in run.results["problems"].items()}
    description = f"{average} of each problem, best first. Problems at 0 or 1 do not distinguish models."
    warned = "".join(f"<p><b>{text(warning)}</b></p>" for warning in warning_lines(run))
    body = (
        f"<h1>{text(run.name)}</h1><p>{text(headline(run))}</p>{warned}"
        f'<h2>Results</h2><div class="card">{html_table(header, rows)}</div>'
        f"{card('By problem', description, plots.problems_plot(by_problem))}"
        f"<h2>Samples</h2>{sample_cards(read_samples(run.folder / SAMPLES), SAMPLES)}"
        f'<h2>Settings</h2><div class="card">{html_table(["setting", "value"], settings)}'
        f"<p>Prompt</p><pre>{text(run.record['prompt'])}</pre><p>{text(versions(run))}</p></div>"
    )
    return page(run.name, body, CELL)


def metric_table(run: EvalRun) -> tuple[list[str], list[list[str]]]:
    level = f"{100 * run.settings['confidence']:g} % interval"
    rows = [
        [
            name,
            shown(name, m["value"]),
            interval(name, m),
            DESCRIPTIONS.get(name.partition("@")[0], "a metric of your own"),
        ]
        for name, m in run.metrics.items()
    ]
    return ["metric", "value", level, ""], rows


def overview(runs: Sequence[EvalRun]) -> tuple[list[str], list[list[str]]]:
    """Returns `(header, rows)` of a table with one evaluation per row. Average@k includes its interval."""
    header = [
        "run",
        "model",
        "adapter",
        "data",
        "k",
        "Average@k",
        "pass@k",
        "maj@k",
        "tokens",
        "truncated",
        "no answer",
    ]
    rows = []
    for run in runs:
        s, m, k = run.settings, run.metrics, run.settings["num_generations"]
        average = m[f"average@{k}"]
        rest = [(name, m.get(name, average)) for name in (f"pass@{k}", f"maj@{k}")]
        rest += [(name, m[name]) for name in ("response_length", "truncated", "no_answer")]
        rows.append(
            [run.name, s["model_name_or_path"], s["adapter"] or "none", s["dataset_name"], str(k)]
            + [f"{shown('average', average['value'])} {interval('average', average)}"]
            + [shown(name, metric["value"]) for name, metric in rest]
        )
    return header, rows


def headline(run: EvalRun) -> str:
    s = run.settings
    adapter = f" with {s['adapter']}" if s["adapter"] else ""
    return (
        f"{s['model_name_or_path']}{adapter} on {run.record['problems']['count']} problems of {s['dataset_name']}, "
        f"{s['num_generations']} samples each at temperature {s['temperature']:g}, up to {s['max_completion_length']} "
        f"new tokens, {s['rollout_engine']} in {s['torch_dtype']} on {run.record['device']}"
    )


def warning_lines(run: EvalRun) -> list[str]:
    """Returns warnings about results that are easily misread: leaked problems, missing boxes."""
    lines = []
    if run.results.get("seen_in_training"):
        lines.append(
            f"{len(run.results['seen_in_training'])} of these problems were trained on or probed with by the run of "
            f"this adapter: they do not measure performance on unseen problems."
        )
    silent = run.metrics["no_answer"]["value"]
    if silent > 0.5 and run.settings["box_only"]:
        lines.append(
            f"{shown('no_answer', silent)} of the samples hold no \\boxed{{}} and count as wrong. For a model that "
            f"does not write one, give --no_box_only."
        )
    return lines


def versions(run: EvalRun) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown in percent. Tokens, and metrics of the user's, are plain numbers."""
    return metric != "response_length" and metric.partition("@")[0] in DESCRIPTIONS


def shown(metric: str, value: float) -> str:
    """A value in the unit of the metric: tokens, percent, or the number itself for a metric of the user's."""
    if metric == "response_length":
        return f"{value:,.0f}"
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.4g}"


def interval(metric: str, estimate: dict[str, float | None], sign: str = "") -> str:
    """Formats "[low, high]" in the unit of the metric, as `shown` does."""
    if estimate["low"] is None:
        return "[no interval: one problem]"
    scale, form = (100, f"{sign}.1f") if is_share(metric) else (1, f"{sign},.0f")
    if metric not in DESCRIPTIONS and scale == 1:
        form = f"{sign}.4g"
    return f"[{scale * estimate['low']:{form}}, {scale * estimate['high']:{form}}]"
