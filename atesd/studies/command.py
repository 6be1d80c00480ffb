"""The arguments of `atesd study` and `atesd sweep`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from atesd.errors import ConfigError
from atesd.reports.printout import Printout, Table, messages_to_stderr
from atesd.studies.reading import load_spec, shipped
from atesd.studies.spec import StudySpec

USAGE = (
    "atesd study NAME_OR_YAML [--recipe RECIPE] [--variants A,B] [--seeds 0,1,2] [--output_dir DIR] [--jobs N]\n"
    "                         [--flag value ...]"
)
SWEEP_USAGE = "atesd sweep RECIPE_OR_YAML [--alphas 0,0.5,1] [--seeds 0,1,2] [--output_dir DIR] [--flag value ...]"


def study(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        overview().show()
        return 0 if argv else 2
    spec = load_spec(argv[0])
    parser = parser_of(spec)
    own, flags = parser.parse_known_args(argv[1:])
    spec = spec.only(words(own.variants), integers("--seeds", own.seeds))
    spec = replace(spec, recipe=own.recipe) if own.recipe else spec
    folder = own.output_dir or f"runs/study-{spec.name}"

    from atesd.studies.study import run_study
    from atesd.studies.study_report import printout

    with messages_to_stderr(own.json):
        run_study(spec, flags, folder, own.jobs)
    printout(Path(folder)).show(own.json)
    return 0


def overview() -> Printout:
    """Returns what `atesd study` prints alone."""
    specs = [load_spec(name) for name in shipped()]
    table = Table("studies that ship", [[spec.name, spec.about, ", ".join(spec.variants)] for spec in specs],
                  ["study", "about", "variants"])  # fmt: skip
    return Printout([f"usage: {USAGE}", table, "`atesd study NAME --help` has a study's settings."], {})


def parser_of(spec: StudySpec) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"atesd study {spec.name}",
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description(spec),
        epilog="All other flags are those of `atesd train`, for every run.",
    )
    parser.add_argument("--recipe", help=f"recipe or YAML file of all runs (default: {spec.recipe})")
    parser.add_argument("--variants", help="only these, with commas between, and the baseline")
    parser.add_argument("--seeds", help=f"with commas between (default: {','.join(map(str, spec.seeds))})")
    parser.add_argument("--output_dir", help=f"folder of the study; the same one goes on (runs/study-{spec.name})")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")
    return parser


def description(spec: StudySpec) -> str:
    width = max(map(len, spec.variants))
    lines = [spec.about, "", f"recipe {spec.recipe}, baseline {spec.baseline}; variants:"]
    for name, settings in spec.variants.items():
        told = " ".join(f"--{key} {value}" for key, value in {**spec.settings, **settings}.items())
        lines.append(f"  {name:{width}}  {told}")
    return "\n".join(lines)


def sweep(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="atesd sweep", usage=SWEEP_USAGE, allow_abbrev=False)
    parser.add_argument("--alphas", help="exposures, with commas between", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--seeds", help="seeds, with commas between", default="0,1,2")
    parser.add_argument("--num_eval_problems", type=int, help="held-out problems that every run is measured on")
    parser.add_argument("--output_dir", help="folder of the runs and the figure; the same one goes on with a sweep")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")
    parser.epilog = "All other flags are those of `atesd train`. It is the study fixed-exposure."
    if not argv:
        parser.print_help()
        return 2
    recipe, flags = (None, argv) if argv[0].startswith("-") else (argv[0], argv[1:])
    own, rest = parser.parse_known_args(flags)
    try:
        alphas = [float(alpha) for alpha in own.alphas.split(",")]
    except ValueError as error:
        raise ConfigError(f"--alphas are numbers with commas between: {error}") from error
    seeds = integers("--seeds", own.seeds) or []

    from atesd.studies.sweep import printout
    from atesd.studies.sweep import sweep as run

    folder = own.output_dir or f"runs/sweep-{Path(recipe or 'run').stem}"
    with messages_to_stderr(own.json):
        done = run(recipe, rest, folder, alphas, seeds, own.num_eval_problems)
    printout(done).show(own.json)
    return 0


def words(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",")] if text else None


def integers(flag: str, text: str | None) -> list[int] | None:
    try:
        return [int(word) for word in words(text) or ()] or None
    except ValueError as error:
        raise ConfigError(f"{flag} are whole numbers with commas between: {error}") from error
