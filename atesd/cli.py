"""The command line: `atesd train | eval | merge | study | sweep | lab | scaling | report | doctor`.

Nothing else knows about argv or exit codes. Nothing heavy is imported before a command needs it: `atesd --help` answers
at once, and a mistyped flag is refused before torch loads.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from signal import SIGPIPE, Signals

from atesd import __version__
from atesd.errors import AtesdError, ConfigError, suggest
from atesd.files import storage_fault
from atesd.reports.printout import messages_to_stderr
from atesd.stopping import Stopped, exit_code, go_on_command, sigterm_interrupts
from atesd.terminal import plain_messages, show, while_it_is_read

COMMANDS = (
    ("train", "train a recipe or YAML file, or go on with a run (--resume)"),
    ("eval", "evaluate a model or a run's adapter, or --compare evaluations"),
    ("merge", "write the model of a run: base and adapter merged, with tokenizer"),
    ("study", "run a study: variants and seeds of a recipe, measured alike and compared with intervals"),
    ("sweep", "run a recipe at fixed exposures and several seeds, and draw outcome and mismatch against alpha"),
    ("lab", "make a small model and its problems, in which a study of the recipe `lab` takes minutes a run"),
    ("scaling", "predicted memory and time of a step for models of 1.7B to 70B on 1 to 64 GPUs; flags as for train"),
    ("report", "draw RUN_DIR/report.html, of a finished run or one under way"),
    ("doctor", "versions, devices, and which backends work here and why others do not"),
)
OWN_FLAGS = ("train", "eval", "study", "sweep", "scaling")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 failure, 2 invalid settings, 128 and
    the number of the signal that ended it.

    Raises:
        SystemExit: after --help and --version, and if nobody reads the output any more.
    """
    with while_it_is_read():
        try:
            return run_command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # at exit, it would be too late to end quietly


def run_command(argv: list[str]) -> int:
    parser, known = build_parser(), [name for name, _ in COMMANDS]
    word = next((word for word in argv if not word.startswith("-")), None)
    if word is not None and word not in known:
        return fail(f"there is no command {word!r}{suggest(word, known)}: the commands are {', '.join(known)}", 2)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None and not rest:
        show(parser.format_help().rstrip())
        return 2
    if rest and arguments.command not in OWN_FLAGS:
        parser.error(f"unexpected {' '.join(rest)!r}")
    try:
        with plain_messages(), sigterm_interrupts():
            if arguments.command in OWN_FLAGS:
                run = {"train": train, "eval": evaluation, "study": study, "sweep": sweep, "scaling": scaling}
                return run[arguments.command](argv[argv.index(arguments.command) + 1 :])
            if arguments.command == "merge":
                return merge(arguments)
            if arguments.command == "lab":
                return lab(arguments)
            if arguments.command == "report":
                return report(Path(arguments.run_dir))
            return doctor(arguments.json)
    except ConfigError as error:
        if os.environ.get("ATESD_TRACEBACK"):
            raise
        return fail(error, 2)
    except KeyboardInterrupt as stop:
        how = "; go on with the same command" if arguments.command in ("eval", "study", "sweep") else ""
        return fail(f"stopped{how}", exit_code(stop))
    except Exception as error:
        if (fault := storage_fault(error)) and not isinstance(error, AtesdError):
            return fail(f"{fault} ({error}): mend that, then run the command again", 1)
        if os.environ.get("ATESD_TRACEBACK") or not needs_no_traceback(error):
            raise
        hint = "" if isinstance(error, AtesdError) else "\n(ATESD_TRACEBACK=1 shows where this was raised)"
        return fail(f"{error}{hint}", 1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atesd", description="Adaptive teacher exposure for on-policy self-distillation."
    )
    parser.add_argument("--version", action="version", version=f"atesd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # They have a flag for every field of their configuration, which HfArgumentParser makes once it is asked for.
    made = {name: commands.add_parser(name, add_help=name not in OWN_FLAGS, help=what) for name, what in COMMANDS}
    add_merge(made["merge"])
    add_lab(made["lab"])
    made["report"].add_argument("run_dir", metavar="RUN_DIR")
    made["doctor"].add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def add_merge(merging: argparse.ArgumentParser) -> None:
    merging.add_argument("run", metavar="RUN", help="run directory (its newest checkpoint), checkpoint or adapter")
    merging.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write; absent or empty")
    merging.add_argument("--model", help="base model, where it is no longer what the run names")
    types, what = ("auto", "float32", "bfloat16", "float16"), "the base model's files; without LoRA, what was trained"
    merging.add_argument("--torch_dtype", choices=types, default="auto", help=f"type of the weights; auto: as {what}")
    merging.add_argument("--push_to_hub", metavar="NAME", help="also upload the merged model to this repository")


def add_lab(making: argparse.ArgumentParser) -> None:
    making.add_argument("--output_dir", default="lab", metavar="DIR", help="folder to write; absent or empty")
    making.add_argument("--seed", type=int, default=0, help="of the model and the documents it learns from")
    making.add_argument("--model", metavar="DIR", help="the model of another lab, in the place of training one")


def train(argv: list[str]) -> int:
    from atesd.config import CONFIG_FILE, config_parser, load_config, recipes
    from atesd.config.options import SOURCES

    if not argv:
        from atesd.config.pages import train_page

        show(train_page())
        return 2
    if {"-h", "--help"} & set(argv):
        config_parser().print_help()
        show(f"\n{SOURCES}\n--json prints what --dry-run says as one JSON document\nrecipes: {', '.join(recipes())}")
        return 0
    argv, as_json = without_json(argv)
    recipe, flags = (None, argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    with messages_to_stderr(as_json):
        config = load_config(recipe, flags)
    if config.dry_run:
        from atesd.planning.dry_run import dry_run

        with messages_to_stderr(as_json):
            plan = dry_run(config)
        plan.show(as_json)
        return 0
    if as_json:
        raise ConfigError("--json prints the plan of a --dry-run: add that flag, or read a run's metrics.jsonl")

    try:
        from atesd import trainer

        run_dir = trainer.train(config)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped) and stop.signal == SIGPIPE:
            return 1  # as while_it_is_read: there is nobody to tell
        if isinstance(stop, Stopped):
            return fail(f"stopped by {Signals(stop.signal).name}. {stop}", exit_code(stop))
        from atesd.storage.checkpoint import latest_checkpoint

        go_on = go_on_command(config.output_dir)
        if latest_checkpoint(config.output_dir):
            return fail(f"stopped; go on with: {go_on}", exit_code(stop))
        if (Path(config.output_dir) / CONFIG_FILE).exists():
            return fail(
                f"stopped before the first checkpoint: nothing is saved yet. Start over with: {go_on}", exit_code(stop)
            )
        return fail("stopped", exit_code(stop))
    if int(os.environ.get("RANK", 0)) == 0:  # of the processes a launcher has started
        show(f"report: {run_dir / 'report.html'}")
        if (run_dir / "adapter").is_dir():
            show(f"adapter: {run_dir / 'adapter'}; `atesd merge {run_dir} --output_dir DIR` makes a model of it")
    return 0


def evaluation(argv: list[str]) -> int:
    from atesd.config.eval_config import eval_parser, load_eval_config
    from atesd.config.options import SOURCES

    if not argv:
        from atesd.config.pages import EVAL

        show(EVAL)
        return 2
    if {"-h", "--help"} & set(argv):
        eval_parser().print_help()
        show(f"\n{SOURCES}\n--json prints the results as one JSON document")
        return 0
    argv, as_json = without_json(argv)
    if "--compare" in argv:
        return comparison(argv, as_json)
    with messages_to_stderr(as_json):
        config = load_eval_config(argv)

        from atesd.evaluation.command import evaluate
        from atesd.evaluation.report import printout

        show(f"evaluation: {config.output_dir}")
        results = printout(evaluate(config))
    results.show(as_json)
    return 0


def comparison(argv: list[str], as_json: bool) -> int:
    parser = argparse.ArgumentParser(prog="atesd eval", allow_abbrev=False)
    parser.add_argument("--compare", nargs="+", metavar="RUN", required=True)
    parser.add_argument("--output_dir", metavar="FOLDER", help="default: evals/compare-A-B")
    arguments = parser.parse_args(argv)

    from atesd.evaluation.compare import compare, printout

    folder = compare(arguments.compare, arguments.output_dir)
    printout(folder, arguments.compare).show(as_json)
    return 0


def study(argv: list[str]) -> int:
    from atesd.studies.command import study as run

    return run(argv)


def sweep(argv: list[str]) -> int:
    from atesd.studies.command import sweep as run

    return run(argv)


def scaling(argv: list[str]) -> int:
    from atesd.planning.scaling import main as tables

    if {"-h", "--help"} & set(argv):
        show("atesd scaling [--json] [--flag value ...]: the flags of `atesd train`, on top of its recipe")
        return 0
    argv, as_json = without_json(argv)
    with messages_to_stderr(as_json):
        predicted = tables(argv)
    predicted.show(as_json)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    from atesd.merge import merge as merged

    show(merged(**{name: value for name, value in vars(arguments).items() if name != "command"}))
    return 0


def lab(arguments: argparse.Namespace) -> int:
    from atesd.studies.lab.pretrain import make_lab

    folder = Path(arguments.output_dir)
    make_lab(folder, arguments.seed, model=Path(arguments.model) if arguments.model else None)
    show(f"made {folder}: go on where it lies, with `atesd train lab` or `atesd study lab-exposure`")
    return 0


def report(run_dir: Path) -> int:
    from atesd.reports.report import write_report

    show(write_report(run_dir))
    return 0


def doctor(as_json: bool) -> int:
    from atesd.planning.doctor import describe

    describe().show(as_json)
    return 0


def without_json(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without --json, and whether it was among them."""
    return [word for word in argv if word != "--json"], "--json" in argv


def needs_no_traceback(error: BaseException) -> bool:
    """Whether to show `error` without a traceback: an AtesdError, or an error that atesd_kernels itself raises.

    atesd_kernels stands alone and raises built-in errors: a model's head it cannot handle, for instance.
    """
    if isinstance(error, AtesdError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kernels = Path(frame.filename).is_relative_to(Path(__file__).parent.with_name("atesd_kernels"))
    return kernels and (frame.line or "").startswith("raise ")


def fail(message: object, code: int) -> int:
    show(f"atesd: {message}", sys.stderr)
    return code
