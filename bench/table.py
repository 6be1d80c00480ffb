"""bench/results/*.json -> the tables of the pages, between `<!-- table: name -->` and `<!-- end table -->`, and plots.

    python -m bench.table            rewrite the tables and draw the plots anew
    python -m bench.table --check    exit 1 if one differs from the committed results
    python -m bench.table --print    print every table there are results for, the pages untouched

No number in such a table is typed by hand: each is printed from a result, with its machine, versions and commit below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import (
    accuracy_vs_kl,
    attention_speed,
    chunk_size,
    gemm_share,
    grading_speed,
    learning_curves,
    loss_speed,
    machine,
    memory,
    plots,
    policy_signal,
    quickstart,
    rollout_speed,
    scaling,
    step_vs_trl,
    studies,
    targets,
    topk_speed,
)
from bench.entrants import DTYPES, LOSSES, NEEDS_GPU, OURS
from bench.gpu.tables import TABLES as GPU_TABLES
from bench.machine import load, markdown
from bench.shapes import SHAPES, SMOLLM2, Shape
from bench.timing import MM_GEMMS, OWN_GEMMS, with_spread

PAGES = tuple(machine.ROOT / name for name in ("README.md", "bench/README.md", "atesd/README.md"))
ABSENT = "(not measured yet"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w/-]+) -->\n)(?P<body>.*?)(<!-- end table -->)", re.DOTALL)


def source(*results: dict) -> str:
    """Where the numbers come from, as lines below the table: one for each machine, commit and set of versions."""
    seen: dict[tuple[str, str], list[float]] = {}
    for result in results:
        m = result["machine"]
        hardware = f"{m['cpu']}, {m['cores']} cores, {m['ram_gib']} GiB, {m['isa']}"
        hardware += " by limit" if m.get("limited") else ""
        hardware += (", bf16 instructions" if m["bf16_instructions"] else "") + (f", {m['gpu']}" if "gpu" in m else "")
        if m["omp_wait_policy"] != "default":
            hardware += f", OMP_WAIT_POLICY={m['omp_wait_policy']}"
        software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        seen.setdefault((hardware, f"{software}; commit {result['commit']}"), []).append(m["load_average"])
    lines = []
    for (hardware, software), loads in seen.items():
        ends = " to ".join(dict.fromkeys((str(min(loads)), str(max(loads)))))
        lines.append(f"\n<sub>{hardware}, load average {ends}; {software}</sub>")
    return "".join(lines)


def of(name: str, table: Callable[[dict], str]) -> Callable[[], str]:
    """The table of the one result `name`."""

    def build() -> str:
        result = load(name)
        return f"{table(result)}\n{source(result)}"

    return build


def loss_results(shape: Shape) -> list[dict]:
    """Of each loss, precision and kind of processor the result with the most tokens.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for loss in LOSSES:
        for dtype in DTYPES:
            results = map(load, machine.names_of(f"losses/{loss}-{dtype}-*"))
            own = [r for r in results if r.get("shape", SMOLLM2._asdict())["name"] == shape.name]
            largest = {machine.processor_kind(r["machine"]): r for r in sorted(own, key=lambda r: r["tokens"])}
            found += [largest[kind] for kind in sorted(largest)]
    if not found:
        raise FileNotFoundError(f"losses/{LOSSES[0]}-*{shape.suffix}.json")
    return found


def losses(shape: Shape) -> str:
    """One row per loss and precision: this library's time, and the others' as a multiple of it: wall (CPU)."""
    results = loss_results(shape)
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
        kind = machine.processor_kind(result["machine"])
        rows.append(
            [f"{result['loss']} {result['dtype']}, N = {result['tokens']:,} ({kind})", with_spread(own), *ratios]
        )
    note = f"H = {shape.hidden:,}, V = {shape.vocab:,}; median and range, others as multiples of it (of its CPU time)."
    missing = [item for result in results for item in result["missing"].items()]
    absent = {name: why for name, why in missing if name not in others and why != NEEDS_GPU}
    if absent:
        note += " Not measured: " + "; ".join(f"{name}, {why}" for name, why in absent.items()) + "."
    return f"{note}\n\n{markdown(['forward + backward', OURS, *others], rows)}\n{source(*results)}"


def learning() -> str:
    found = learning_curves.results()
    return f"{learning_curves.table(found)}\n{source(*found)}"


def predicted_scaling() -> str:
    """Formulas, no result file. Imported late: it builds models, without weights, from transformers' classes."""
    from atesd.config import load_config
    from atesd.planning import scaling as predictions

    config = load_config(predictions.RECIPE, [])
    return f"{predictions.overview(config)}\n\n<sub>{predictions.LABEL}: {predictions.assumptions(config)}</sub>"


TABLES: dict[str, Callable[[], str]] = {
    "targets": targets.table,
    "accuracy_vs_kl": of("accuracy_vs_kl", accuracy_vs_kl.table),
    "scaling": of("scaling", scaling.table),
    "chunk_size": of("chunk_size", chunk_size.table),
    "topk_speed": of("topk_speed", topk_speed.table),
    "attention_speed": of("attention_speed", attention_speed.table),
    "grading_speed": of("grading_speed", grading_speed.table),
    **{f"step_vs_trl-{dtype}": of(f"step_vs_trl-{dtype}", step_vs_trl.table) for dtype in DTYPES},
    "learning_curves": learning,
    **{name: partial(studies.table, name) for name in studies.SHOWN},
    studies.QUICKSTART: partial(studies.before_and_after, studies.QUICKSTART),
    "statements": studies.statements,
    policy_signal.NAME: of(policy_signal.NAME, policy_signal.table),
    "predicted_scaling": predicted_scaling,
    "rollout_speed": of("rollout_speed", rollout_speed.speed_table),
    "weight_sync": of("weight_sync", rollout_speed.sync_table),
    **GPU_TABLES,
}
for shape in SHAPES.values():
    TABLES[f"losses{shape.suffix}"] = lambda shape=shape: losses(shape)
    TABLES[f"memory{shape.suffix}"] = of(f"memory{shape.suffix}", memory.table)
    TABLES[f"gemm_share{shape.suffix}"] = of(f"gemm_share{shape.suffix}", gemm_share.table)
PLOTS: dict[str, Callable[[dict, Path, str], None]] = {
    "accuracy_vs_kl": accuracy_vs_kl.plot,
    "memory": memory.plot,
    "scaling": scaling.plot,
    "quickstart": quickstart.plot,
}


def tables_of_losses() -> dict[str, Callable[[], str]]:
    """One for each result there is of a loss: every entrant, both phases."""
    return {name: of(name, loss_speed.table) for name in machine.names_of("losses/*")}


def picture(name: str) -> Path:
    return machine.RESULTS / f"{name}.png"


def stale_plots() -> list[str]:
    """Plots that were not drawn from the results that are there."""
    results = {name: machine.RESULTS / f"{name}.json" for name in PLOTS}
    return [n for n, r in results.items() if r.exists() and plots.stamp_of(picture(n)) != plots.digest(r)]


def draw(names: list[str]) -> None:
    for name in names:
        PLOTS[name](load(name), picture(name), plots.digest(machine.RESULTS / f"{name}.json"))


def render(name: str) -> str:
    """A table, or a line saying that this checkout holds no result for it."""
    tables = TABLES | tables_of_losses()
    if name not in tables:
        raise KeyError(f"a table is marked {name!r}; known: {', '.join(tables)}")
    try:
        return without_absent_gpu(tables[name]())
    except FileNotFoundError as error:
        return f"{ABSENT}: no {Path(str(error.filename or error)).name} in bench/results)"


def without_absent_gpu(table: str) -> str:
    """`table` without the rows that only say that an entrant needs a GPU: the page says so once, above its tables."""
    return "".join(line for line in table.splitlines(keepends=True) if not (line[0] == "|" and NEEDS_GPU in line))


def fill(text: str) -> str:
    """`text` with every marked table built anew. Raises KeyError for a name that is no table."""

    return MARKED.sub(lambda m: f"{m[1]}{render(m['name'])}\n{m[4]}", text)


def every_table() -> str:
    """All there are results for."""
    rendered = {name: render(name) for name in TABLES | tables_of_losses()}
    return "\n\n".join(f"### {name}\n\n{text}" for name, text in rendered.items() if not text.startswith(ABSENT))


def differing(before: str, after: str) -> list[str]:
    pairs = zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
    return [old["name"] for old, new in pairs if old["body"] != new["body"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="fail if a page or a plot does not match the results")
    parser.add_argument("--print", action="store_true", help="print every table")
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES, help="the pages (default: all of the project)")
    options = parser.parse_args(arguments)
    if options.print:
        print(every_table())
        return 0
    count, wrong = 0, []
    for page in options.page:
        before = page.read_text(encoding="utf-8")
        try:
            after = fill(before)
        except KeyError as error:
            print(f"{page.name}: {error.args[0]}", file=sys.stderr)
            return 1
        if before.count("<!-- table: ") != len(list(MARKED.finditer(before))):
            print(f"{page.name}: a table marker has no end", file=sys.stderr)
            return 1
        count += len(list(MARKED.finditer(after)))
        wrong += [f"{page.name}: table {name!r} is not what bench/results holds" for name in differing(before, after)]
        if not options.check:
            page.write_text(after, encoding="utf-8")
    if options.check:
        wrong += [f"{picture(name).name} was not drawn from {name}.json as it is" for name in stale_plots()]
        for line in wrong:
            print(f"{line}; run python -m bench.table")
        return 1 if wrong else 0
    draw(stale_plots())
    print(f"{count} tables, {len(wrong)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
