"""bench/results/*.json -> the tables of README.md, between `<!-- table: name -->` and `<!-- end table -->`.

    python -m bench.table            rewrite the tables of README.md
    python -m bench.table --check    exit 1 if one differs from the committed results
    python -m bench.table --print    print every table, README.md untouched

No number in such a table is typed by hand: each is printed from a result, with its machine, versions and commit below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import accuracy_vs_kl, chunk_size, loss_speed, memory
from bench.entrants import DTYPES, LOSSES, OURS
from bench.machine import RESULTS, ROOT, markdown
from bench.timing import MM_GEMMS, OWN_GEMMS

README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end table -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(result: dict) -> str:
    """Where the numbers come from, as a line below the table."""
    m, packages = result["machine"], result["versions"]
    hardware = f"{m['cpu']}, {m['cores']} cores, {m['ram_gib']} GiB, {m['isa']}"
    hardware += (", bf16 instructions" if m["bf16_instructions"] else "") + (f", {m['gpu']}" if "gpu" in m else "")
    software = ", ".join(f"{name} {version}" for name, version in packages.items())
    return f"\n<sub>{hardware}; {software}; commit {result['commit']}</sub>"


def accuracy() -> str:
    result = load("accuracy_vs_kl")
    return f"{accuracy_vs_kl.table(result)}\n{source(result)}"


def memory_over_tokens() -> str:
    result = load("memory")
    return f"{memory.table(result)}\n{source(result)}"


def one_loss(loss: str, dtype: str) -> Callable[[], str]:
    def build() -> str:
        result = load(f"losses/{loss}-{dtype}-{loss_speed.TOKENS}")
        return f"{loss_speed.table(result)}\n{source(result)}"

    return build


def losses_summary() -> str:
    """One row per loss and precision: this library's time, and each peer's as a multiple of it."""
    results = [
        load(f"losses/{loss}-{dtype}-{loss_speed.TOKENS}")
        for loss in LOSSES
        for dtype in DTYPES
        if (RESULTS / f"losses/{loss}-{dtype}-{loss_speed.TOKENS}.json").exists()
    ]
    if not results:
        raise FileNotFoundError(f"{RESULTS}/losses: no result at {loss_speed.TOKENS} tokens")
    both = loss_speed.PHASES[0]
    by_result = [{r["entrant"]: r["median"] for r in x["rows"] if r["phase"] == both} for x in results]
    peers = [n for n in dict.fromkeys(n for x in by_result for n in x) if n not in (OURS, OWN_GEMMS, MM_GEMMS)]
    rows = []
    for result, medians in zip(results, by_result, strict=True):
        cells = [f"{medians[n] / medians[OURS]:.2f}x" if n in medians else "-" for n in peers]
        floor = [f"{medians[n] / medians[OURS]:.0%}" if n in medians else "-" for n in (OWN_GEMMS, MM_GEMMS)]
        rows.append([f"{result['loss']} {result['dtype']}", f"{medians[OURS]:.2f} s", *cells, *floor])
    header = ["forward + backward", OURS, *peers, f"{OWN_GEMMS} / time", f"{MM_GEMMS} / time"]
    return f"{markdown(header, rows)}\n{source(results[0])}"


def chunks() -> str:
    result = load("chunk_size")
    return f"{chunk_size.table(result)}\n{source(result)}"


TABLES: dict[str, Callable[[], str]] = {
    "accuracy_vs_kl": accuracy,
    "memory": memory_over_tokens,
    "losses": losses_summary,
    **{f"losses-{loss}-{dtype}": one_loss(loss, dtype) for loss in LOSSES for dtype in DTYPES},
    "chunk_size": chunks,
}


def fill(text: str) -> str:
    """`text` with every marked table built anew. Raises KeyError for a name that is no table."""

    def build(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise KeyError(f"README.md marks a table {match['name']!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match['name']]()}\n{match[4]}"

    return MARKED.sub(build, text)


def differing(before: str, after: str) -> list[str]:
    pairs = zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
    return [old["name"] for old, new in pairs if old["body"] != new["body"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="fail if README.md does not match the results")
    parser.add_argument("--print", action="store_true", help="print every table")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    if options.print:
        for name, build in TABLES.items():
            try:
                print(f"### {name}\n\n{build()}\n")
            except FileNotFoundError as error:
                print(f"### {name}\n\nno result yet: {error.filename or error}\n")
        return 0
    before = options.readme.read_text(encoding="utf-8")
    try:
        after = fill(before)
    except (KeyError, FileNotFoundError) as error:
        print(f"{options.readme.name}: {error}", file=sys.stderr)
        return 1
    stale = differing(before, after)
    if options.check:
        if before.count("<!-- table: ") != len(list(MARKED.finditer(before))):
            print(f"{options.readme.name}: a table marker has no end", file=sys.stderr)
            return 1
        for name in stale:
            print(f"{options.readme.name}: table {name!r} is not what bench/results holds; run python -m bench.table")
        return 1 if stale else 0
    options.readme.write_text(after, encoding="utf-8")
    print(f"{len(list(MARKED.finditer(after)))} tables, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
