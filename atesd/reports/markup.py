"""Markup shared by the reports of runs and evaluations: self-contained HTML pages, cards and tables.

Pass all content from a run or a user through `text`, which escapes it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

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


def page(title: str, body: str, css: str = "") -> str:
    """Returns the HTML document of `body`, with the shared style followed by `css`."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}{css}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )


def card(title: str, description: str, image: str | None) -> str:
    picture = f'<img alt="{text(title)}" src="{image}">' if image else "<p>Nothing measured yet.</p>"
    return f'<div class="card"><h3>{text(title)}</h3><p>{text(description)}</p>{picture}</div>'


def sample_cards(samples: list[dict[str, Any]], file: str, latest: int = 3) -> str:
    """Returns cards of the first and the latest samples, and a line that says which they are of those in `file`.

    Short values go in the headline of a card, long ones below it.
    """
    if not samples:
        return "<p>No sample yet.</p>"
    chosen, which = samples, f"All {len(samples)} of {file}."
    if len(samples) > latest + 1:
        chosen = [samples[0], *samples[-latest:]]
        which = f"The first and the last {latest} of {len(samples)}; all are in {file}."
    cards = []
    for sample in chosen:
        short = {k: v for k, v in sample.items() if not isinstance(v, str) or (0 < len(v) <= 40 and "\n" not in v)}
        head = " · ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())
        long = {k: v or "(nothing)" for k, v in sample.items() if k not in short}
        body = "".join(f"<p>{text(k)}</p><pre>{text(v)}</pre>" for k, v in long.items())
        cards.append(f'<div class="card"><h3>{text(head)}</h3>{body}</div>')
    return f'<p>{text(which)}</p><div class="samples">{"".join(cards)}</div>'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table></div>'


def text(value: object) -> str:
    return html.escape(str(value))
