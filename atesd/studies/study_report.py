"""What a study shows: one table in the terminal and in study.md, one figure, and one HTML page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from atesd.errors import ConfigError
from atesd.files import write_atomically
from atesd.reports.learned import interval
from atesd.reports.markup import card, html_table, markdown_table, page, text
from atesd.reports.printout import Printout, Table
from atesd.studies.comparison import METRICS

STUDY = "study.json"
WRITTEN = ("study.md", "study.png", "study.html")
MAIN = "average"
SHORT = {
    "average": "average@{k}",
    "pass": "pass@{k}",
    "response_length": "length",
    "no_answer": "no answer",
    "mismatch": "KL",
    "reference_nll": "reference NLL",
}


def write_study_report(folder: Path) -> Path:
    """Writes study.md, study.png and study.html from FOLDER/study.json. Returns `folder`."""
    study = load_study(folder)
    header, rows = table(study)
    lines = [f"# {study['study']}", study["about"], markdown_table(header, rows), *notes(study)]
    write_atomically(folder / "study.md", "\n\n".join(lines) + "\n")
    picture = figure(study)
    (folder / "study.png").write_bytes(picture)
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    facts = "".join(f"<p>{text(line)}</p>" for line in notes(study))
    meaning = html_table(["column", "meaning"], [[column(m, study), METRICS[m]] for m in METRICS])
    body = f"<h1>{text(study['study'])}</h1><p>{text(study['about'])}</p>{html_table(header, rows)}{facts}"
    body += card("difference to the baseline", "dots: seeds; bars: t intervals over seeds", source) + meaning
    write_atomically(folder / "study.html", page(study["study"], body))
    return folder


def load_study(folder: Path) -> dict[str, Any]:
    file = folder / STUDY
    if not file.is_file():
        raise ConfigError(f"{folder} holds no finished study: it has no {STUDY}. Run its `atesd study` command again")
    try:
        study = dict(json.loads(file.read_text(encoding="utf-8")))
        return {**study, "study": str(study["study"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is damaged ({error!r}): delete it, and the command of its study makes it again from its runs"
        ) from error


def printout(folder: Path) -> Printout:
    """Returns what the terminal shows of a finished study."""
    study = load_study(folder)
    header, rows = table(study)
    title = f"{study['study']}: means over {len(study['seeds'])} seeds, after training"
    report = f"report: {folder / 'study.html'}"
    return Printout([Table(title, rows, header), "\n".join(notes(study)), report], {**study, "folder": str(folder)})


def table(study: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: a variant's means, its change, its difference to the baseline, the published number."""
    published = any(variant["published"] for variant in study["variants"].values())
    header = ["variant", *(column(metric, study) for metric in METRICS)]
    header += [f"{column(MAIN, study)}, after - before", f"less {study['baseline']}"]
    header += ["published", "of"] if published else []
    rows = []
    for name, variant in study["variants"].items():
        main = variant["metrics"][MAIN]
        row = [name + " (no signal)" * variant.get("no_signal", False)]
        row += [number(variant["metrics"][metric]["mean"]) for metric in METRICS]
        row += [with_interval(main["change"]), with_interval(main["difference"])]
        if published:
            given = variant["published"] or {}
            row += [str(given.get("value", "")), str(given.get("source", ""))]
        rows.append(row)
    return header, rows


def notes(study: dict[str, Any]) -> list[str]:
    measure = study["measure"]
    lines = [
        f"{measure['problems']} held-out problems a seed, {measure['k']} samples of each at temperature "
        f"{measure['temperature']:g}. Intervals: {study['confidence']:.0%}, Student's t over {len(study['seeds'])} "
        "seeds, paired by seed and problem."
    ]
    if len(study["seeds"]) < 2:
        lines.append("One seed gives no interval.")
    if any(variant.get("no_signal") for variant in study["variants"].values()):
        lines.append("No signal: the teacher reads what the student reads, and starts equal to it.")
    if any(variant["published"] for variant in study["variants"].values()):
        lines.append("Published numbers belong to the recipe that is named beside them, not to this one.")
    return lines


def column(metric: str, study: dict[str, Any]) -> str:
    return SHORT[metric].format(k=study["measure"]["k"])


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def with_interval(estimate: dict[str, Any] | None) -> str:
    return "" if estimate is None else interval(estimate, "+", digits=3)


def figure(study: dict[str, Any]) -> bytes:
    """Draws each variant's Average@k: the seeds, and the change with its interval beside it."""
    import matplotlib
    from matplotlib.figure import Figure

    from atesd.reports.plots import BLUE, INK, STYLE

    names = list(study["variants"])
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(8.4, 1.2 + 0.42 * len(names)), dpi=144, layout="constrained")
        values, changes = drawn.subplots(1, 2, sharey=True)
        for place, name in enumerate(reversed(names)):
            main = study["variants"][name]["metrics"][MAIN]
            values.plot(main["by_seed"], [place] * len(main["by_seed"]), "o", color=BLUE, ms=4, alpha=0.5)
            values.plot([main["mean"]], [place], "|", color=INK, ms=14, mew=2)
            change = main["change"]
            low, high = (change[end] if change[end] is not None else change["value"] for end in ("low", "high"))
            error = [[change["value"] - low], [high - change["value"]]]
            changes.errorbar([change["value"]], [place], xerr=error, fmt="o", color=INK, ms=4, capsize=3)
        values.set_yticks(range(len(names)), list(reversed(names)))
        values.set_title(f"{column(MAIN, study)} after training", fontsize=9)
        changes.axvline(0.0, color=INK, lw=0.8)
        changes.set_title("change through training", fontsize=9)
        file = io.BytesIO()
        drawn.savefig(file, format="png")
    return file.getvalue()
