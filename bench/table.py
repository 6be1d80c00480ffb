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

from bench import accuracy_vs_kl, chunk_size, grading_speed, learning_curves, loss_speed, memory
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
    hardware += f", load average {m['load_average']}"
    if m["omp_wait_policy"] != "default":
        hardware += f", OMP_WAIT_POLICY={m['omp_wait_policy']}"
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
    """One row per loss and precision: this library's time, and the others' as a multiple of it: wall (CPU)."""
    files = [f"losses/{loss}-{dtype}-{loss_speed.TOKENS}" for loss in LOSSES for dtype in DTYPES]
    results = [load(name) for name in files if (RESULTS / f"{name}.json").exists()]
    if not results:
        raise FileNotFoundError(f"{RESULTS}/{files[0]}.json")
    rows, both = [], loss_speed.PHASES[0]
    by_result = [{r["entrant"]: r for r in result["rows"] if r["phase"] == both} for result in results]
    others = [name for name in dict.fromkeys(name for found in by_result for name in found) if name != OURS]
    others.sort(key=lambda name: name in (OWN_GEMMS, MM_GEMMS))
    for result, found in zip(results, by_result, strict=True):
        own = found[OURS]
        ratios = [
            f"{found[n]['median'] / own['median']:.2f}x ({found[n]['cpu'] / own['cpu']:.2f}x)" if n in found else "-"
            for n in others
        ]
        rows.append([f"{result['loss']} {result['dtype']}", f"{own['median']:.2f} s ({own['cpu']:.2f} s)", *ratios])
    note = f"N = {loss_speed.TOKENS:,}, H = 576, V = 49,152; time (CPU time), others as multiples."
    return f"{note}\n\n{markdown(['forward + backward', OURS, *others], rows)}\n{source(results[0])}"


def whole_step() -> str:
    """`step_vs_trl` saves {"tokens", "rows": [{"name", "seconds", "cpu_seconds", "peak", "phases"}]}."""
    result = load("step_vs_trl")
    rows = [
        [
            row["name"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{result['tokens'] / row['seconds']:.0f}",
            f"{row['peak'] / 1e9:.2f}",
            ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["phases"].items()),
        ]
        for row in result["rows"]
    ]
    header = ["whole step", "seconds", "CPU seconds", "tokens/s", "peak GB", "of it, seconds"]
    return f"{markdown(header, rows)}\n{source(result)}"


def chunks() -> str:
    result = load("chunk_size")
    return f"{chunk_size.table(result)}\n{source(result)}"


def grading() -> str:
    result = load("grading_speed")
    return f"{grading_speed.table(result)}\n{source(result)}"


def learning() -> str:
    found = learning_curves.results()
    return f"{learning_curves.table(found)}\n{source(found[0])}"


TABLES: dict[str, Callable[[], str]] = {
    "accuracy_vs_kl": accuracy,
    "memory": memory_over_tokens,
    "losses": losses_summary,
    **{f"losses-{loss}-{dtype}": one_loss(loss, dtype) for loss in LOSSES for dtype in DTYPES},
    "chunk_size": chunks,
    "grading_speed": grading,
    "step_vs_trl": whole_step,
    "learning_curves": learning,
}


def render(name: str) -> str:
    """A table, or a line saying that this checkout holds no result for it."""
    if name not in TABLES:
        raise KeyError(f"a table is marked {name!r}; known: {', '.join(TABLES)}")
    try:
        return TABLES[name]()
    except FileNotFoundError as error:
        return f"(not measured yet: no {Path(str(error.filename or error)).name} in bench/results)"


def fill(text: str) -> str:
    """`text` with every marked table built anew. Raises KeyError for a name that is no table."""

    return MARKED.sub(lambda m: f"{m[1]}{render(m['name'])}\n{m[4]}", text)


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
        print("\n\n".join(f"### {name}\n\n{render(name)}" for name in TABLES))
        return 0
    before = options.readme.read_text(encoding="utf-8")
    try:
        after = fill(before)
    except KeyError as error:
        print(f"{options.readme.name}: {error.args[0]}", file=sys.stderr)
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
