"""Shows what a run has changed on its held-out problems: in the last lines of the command, and first in its report.

`evaluation/learned.py` makes the comparison.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atesd.reports.markup import text

ANSWERS = "answers"
COMPARISON = f"{ANSWERS}/comparison.json"
SHOWN_CHARACTERS = 400


def read_comparison(run_dir: Path) -> dict[str, Any] | None:
    """Returns the comparison; None if the run was not evaluated before and during training, or it is damaged."""
    try:
        found = dict(json.loads((run_dir / COMPARISON).read_text(encoding="utf-8")))
        return found if {"step", "num_problems", "before", "after", "change", "example"} <= found.keys() else None
    except (OSError, ValueError, TypeError):
        return None


def headline(found: dict[str, Any]) -> str:
    return (
        f"held-out accuracy {interval(found['before'])} -> {interval(found['after'])} on {found['num_problems']} "
        f"problems (change {interval(found['change'], '+')})"
    )


def as_lines(found: dict[str, Any]) -> str:
    """Returns the headline and one problem, answered before and after."""
    lines = [headline(found), *(f"  {label}: {shortened(body)}" for label, body in example(found))]
    return "\n".join(lines)


def as_card(found: dict[str, Any]) -> str:
    body = "".join(f"<p>{text(label)}</p><pre>{text(body)}</pre>" for label, body in example(found))
    about = "Share of right answers before training and after, with 95 % intervals; one of the problems below."
    return f'<div class="card"><h3>{text(headline(found))}</h3><p>{about}</p>{body}</div>'


def example(found: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = found["example"]
    verdicts = ["right" if sample["correct"] else "wrong" for sample in (before, after)]
    return [
        ("problem", before["problem"]),
        ("its answer", before["answer"]),
        (f"before, {verdicts[0]}", before["text"]),
        (f"after step {found['step']}, {verdicts[1]}", after["text"]),
    ]


def interval(found: dict[str, Any], sign: str = "", digits: int = 2) -> str:
    """Returns "0.34 [0.25, 0.44]"; without the interval where there is none."""
    form = f"{sign}.{digits}f"
    ends = "" if found["low"] is None else f" [{found['low']:{form}}, {found['high']:{form}}]"
    return f"{found['value']:{form}}{ends}"


def shortened(body: str) -> str:
    """Returns the text on one line, without its middle if it is long: the answer stands at its end."""
    half, body = SHOWN_CHARACTERS // 2, " ".join(body.split())
    return body if len(body) <= SHOWN_CHARACTERS else f"{body[:half]} [...] {body[-half:]}"
