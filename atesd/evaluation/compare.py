"""`atesd eval --compare`: tabulates finished evaluations, and compares runs on the same problems pairwise.

The comparison subtracts the first run from the second problem by problem. The interval therefore excludes the variance
that comes from the difficulty of the problems.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from atesd.evaluation import plots
from atesd.evaluation.files import EvalError, flat
from atesd.evaluation.report import CELL, EvalRun, interval, is_share, load_run, overview, shown
from atesd.evaluation.statistics import estimate
from atesd.files import write_atomically, write_json
from atesd.reports.markup import card, html_table, markdown_table, page, text
from atesd.reports.printout import Printout, Table
from atesd.storage.folder import own

COMPARISON = "comparison.json"
WRITTEN = ("comparison.md", "comparison.html")
# entries that are expected to differ between two runs
EXPECTED = (
    "model_name_or_path",
    "adapter",
    "output_dir",
    "model files",
    "adapter files",
    "confidence",
    "num_bootstrap",
)


def compare(folders: Sequence[str | Path], output_dir: str | Path | None = None) -> Path:
    """Writes `comparison.md`, `comparison.html` and `comparison.json`. Returns their folder.

    Compares each run with the first run on the same problems.

    Args:
        folders: finished evaluations, two or more.
        output_dir: the folder to write to (default: evals/compare-A-B).

    Raises:
        EvalError: there are fewer than two runs, a run is unfinished, or no two runs have the same problems, or the
            folder holds files of these names that no comparison has written.
        ConfigError: the folder cannot be made or written to.
    """
    runs = [load_run(folder) for folder in folders]
    if len(runs) < 2:
        raise EvalError("--compare needs two evaluations or more, e.g. atesd eval --compare RUN_A RUN_B")
    first_on: dict[str, EvalRun] = {}
    pairs = []
    for run in runs:
        first = first_on.setdefault(run.record["problems"]["digest"], run)
        if first is not run:
            pairs.append(paired(first, run))
    if not pairs:
        read = ", ".join(f"{r.name}: {r.record['problems']['count']} of {r.settings['dataset_name']}" for r in runs)
        raise EvalError(
            f"no two of these evaluations answered the same problems ({read}): evaluate with the same --data, "
            f"--num_problems and --data_seed"
        )
    folder = Path(output_dir or f"evals/compare-{'-'.join(run.name for run in runs[:2])}")
    header, rows = overview(runs)
    with own(folder, "output_dir") as owned:
        if not (folder / COMPARISON).exists() and (found := [name for name in WRITTEN if (folder / name).exists()]):
            owned.discard()
            raise EvalError(f"{folder} holds {found[0]}, which no comparison has written: choose another --output_dir")
        write_json(folder / COMPARISON, {"pairs": pairs})
        write_atomically(folder / "comparison.md", markdown(header, rows, pairs))
        write_atomically(folder / "comparison.html", html(header, rows, pairs))
        owned.discard()  # what is written stays, the lock goes
    return folder


def printout(folder: Path, folders: Sequence[str | Path]) -> Printout:
    """Returns what the terminal shows of the comparison in `folder`, which is one of the evaluations `folders`."""
    pairs = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))["pairs"]
    header, rows = overview([load_run(each) for each in folders])
    parts: list[str | Table] = [Table("evaluations", rows, header)]
    for pair in pairs:
        header, rows = rows_of(pair)
        parts += [Table(f"{pair['b']} - {pair['a']}", rows, header), *notes(pair)]
    report = folder / "comparison.html"
    return Printout([*parts, f"report: {report}"], {"pairs": pairs, "folder": str(folder), "report": str(report)})


def paired(a: EvalRun, b: EvalRun) -> dict[str, Any]:
    """Returns `b - a`, paired by problem: `{a, b, confidence, metrics, by_problem, better, worse, equal, settings}`.

    Average@k is compared even if k differs. Every other metric is compared if both runs have it.
    """
    tables = [{canonical(run, name): name for name in run.metrics} for run in (a, b)]
    names = [name for name in tables[0] if name in tables[1]]
    ids = list(a.results["problems"])
    values = [
        np.array([[run.results["problems"][i][table[name]] for name in names] for i in ids])
        for run, table in zip((a, b), tables, strict=True)
    ]
    difference = values[1] - values[0]
    estimates = estimate(difference, a.settings["confidence"], a.settings["num_bootstrap"])
    average = difference[:, names.index("average")]
    before, now = flat(a.record, EXPECTED), flat(b.record, EXPECTED)
    return {
        "a": a.name,
        "b": b.name,
        "confidence": a.settings["confidence"],
        "metrics": {
            name: {"a": float(means[0]), "b": float(means[1]), **asdict(e)}
            for name, means, e in zip(
                names, zip(values[0].mean(0), values[1].mean(0), strict=True), estimates, strict=True
            )
        },
        "by_problem": dict(zip(ids, average.tolist(), strict=True)),
        "better": int((average > 0).sum()),
        "worse": int((average < 0).sum()),
        "equal": int((average == 0).sum()),
        "settings": {name: [before.get(name), now.get(name)] for name in before if before[name] != now.get(name)},
    }


def canonical(run: EvalRun, metric: str) -> str:
    """Maps average@12 to average, which is comparable between any two k. Other names stay unchanged."""
    return "average" if metric.startswith("average@") else metric


def rows_of(pair: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, m in pair["metrics"].items():
        value = f"{100 * m['value']:+,.1f} points" if is_share(name) else f"{m['value']:+.4g}"
        if name == "response_length":
            value = f"{m['value']:+,.0f} tokens"
        rows.append([name, shown(name, m["a"]), shown(name, m["b"]), value, interval(name, m, "+")])
    level = f"{100 * pair['confidence']:g} % interval"
    return ["metric", pair["a"], pair["b"], f"{pair['b']} - {pair['a']}", level], rows


def notes(pair: dict[str, Any]) -> list[str]:
    lines = [f"Better on {pair['better']} problems, worse on {pair['worse']}, equal on {pair['equal']}."]
    if pair["settings"]:
        listed = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in pair["settings"].items())
        lines.append(f"Apart from model and adapter, they differ in: {listed}.")
    return lines


def markdown(header: list[str], rows: list[list[str]], pairs: list[dict[str, Any]]) -> str:
    parts = ["# Comparison", markdown_table(header, rows)]
    for pair in pairs:
        parts += [f"## {pair['b']} - {pair['a']}", markdown_table(*rows_of(pair)), *notes(pair)]
    return "\n\n".join(parts) + "\n"


def html(header: list[str], rows: list[list[str]], pairs: list[dict[str, Any]]) -> str:
    body = f'<h1>Comparison</h1><div class="card">{html_table(header, rows)}</div>'
    for pair in pairs:
        name = f"{pair['b']} - {pair['a']}"
        rates = {key: m for key, m in pair["metrics"].items() if key != "response_length"}
        picture = plots.difference_plot(rates, pair["by_problem"], "difference")
        description = "Left: each rate with its interval (grey if the interval contains 0). Right: average by problem."
        body += (
            f'<h2>{text(name)}</h2><div class="card">{html_table(*rows_of(pair))}'
            f"{''.join(f'<p>{text(note)}</p>' for note in notes(pair))}</div>{card(name, description, picture)}"
        )
    return page("Comparison", body, CELL)
