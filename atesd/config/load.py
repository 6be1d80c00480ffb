"""Reads the configuration of a run, one flat dataclass, from a recipe or YAML file and then from flags.

fields.py defines the fields, their defaults, sources and ranges. options.py checks single fields, checks.py checks
combinations. Nothing here imports torch, so that a mistyped key raises an error at once.
"""

from __future__ import annotations

import json
import os
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Mapping
from copy import copy
from dataclasses import Field, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from atesd.config import fields as groups
from atesd.config.checks import check, check_resumable
from atesd.config.options import with_range
from atesd.errors import ConfigError, suggest
from atesd.files import write_atomically

CONFIG_FILE = "config.yaml"
PATHS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "prompt_templates")
COUNTS = ("num_train_problems", "num_probe_problems", "num_eval_problems")


@dataclass
class ATESDConfig(groups.Settings):
    """Everything a run needs to know, under Hugging Face and TRL names; the fields are in `fields.py`.

    Example:
        >>> from atesd.config import load_config
        >>> load_config("quickstart", ["--max_steps", "2"]).max_steps
        2
    """

    # Whether output_dir is the default, which contains the time: a run then takes the next free name.
    named_by_time: ClassVar[bool] = False
    # Counts of problems that were chosen for other data: as many are taken as there are.
    up_to: ClassVar[frozenset[str]] = frozenset()

    def validate(self) -> None:
        """Raises ConfigError (a ValueError) naming the first field that cannot be used, before anything loads."""
        check(self)

    def save(self, run_dir: str | os.PathLike[str]) -> Path:
        """Writes the resolved settings as RUN_DIR/config.yaml, atomically, for `load_config`. Makes the folder."""
        path = Path(run_dir) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        once = {"resume": None, "allow_changed_inputs": False}  # said of one start, not of the run
        write_atomically(path, yaml.safe_dump(asdict(self) | once, sort_keys=False))
        return path


def settings_of_run(run_dir: Path) -> ATESDConfig:
    """The settings in RUN_DIR/config.yaml; defaults for those that it lacks.

    Raises:
        ConfigError: the file cannot be read.
    """
    return load_config(None, ["--resume", str(run_dir)])


def load_config(recipe_or_yaml: str | None, flags: list[str]) -> ATESDConfig:
    """A validated configuration: defaults, then the recipe or YAML file, then flags; the later wins.

    Args:
        recipe_or_yaml: a recipe that ships with the package (`quickstart`), a YAML file, or None for the defaults.
        flags: command-line flags such as ["--max_steps", "2"]. With `--resume RUN_DIR` the settings come from
            RUN_DIR/config.yaml, and flags may change those in `fields.MAY_CHANGE`.

    Raises:
        ConfigError: an unknown key or flag, a value of the wrong type, or settings that cannot go together.
    """
    parser = config_parser()
    given = parse(parser, flags)
    file = settings_file(recipe_or_yaml, given.resume)
    settings = read_yaml(file) if file else {}
    # A flag cannot say "absent"; YAML's null can.
    parser.set_defaults(**{name: None for name, value in settings.items() if value is None})
    config = parse(parser, [*as_flags(settings), *flags])
    if config.resume:
        check_resumable(saved=parse(parser, as_flags(settings)), given=config, output_dir=given.output_dir)
        config.output_dir = config.resume
    elif config.output_dir is None:
        config.output_dir = f"runs/{file.stem if file else 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
        config.named_by_time = True  # type: ignore[misc]
    config.up_to = counts_up_to(file, recipe_or_yaml, flags)  # type: ignore[misc]
    config.validate()
    return config


def settle_paths(config: ATESDConfig) -> None:
    """Makes the paths of files and folders absolute, so that a run can go on from any folder. Names of the Hub stay."""
    for name in PATHS:
        value = getattr(config, name)
        if value and Path(value).expanduser().exists():
            setattr(config, name, str(Path(value).expanduser().absolute()))


def counts_up_to(file: Path | None, recipe_or_yaml: str | None, flags: list[str]) -> frozenset[str]:
    """Returns the counts of problems that nobody chose for this data set: defaults, and those of a recipe.

    A count in the user's own file or in a flag is meant. So is a recipe's where the data set is the recipe's own.
    """
    spelled = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags]
    of_recipe = recipe_or_yaml in recipes()
    own = read_own(file) if file and not (of_recipe and "dataset_name" in spelled) else {}
    return frozenset(COUNTS) - {*spelled, *own}


def settings_file(recipe_or_yaml: str | None, resume: str | None) -> Path | None:
    if resume is not None:
        if not resume:
            raise ConfigError("resume is empty: give a run directory (is a variable of the shell unset?)")
        if recipe_or_yaml:
            raise ConfigError(
                f"resume is {resume!r}, which brings its own settings, so the recipe {recipe_or_yaml!r} has no place: "
                f"leave one of them out"
            )
        path = Path(resume) / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(f"resume is {resume!r}, which is no run directory: it has no {CONFIG_FILE}")
        return path
    return find_recipe(recipe_or_yaml) if recipe_or_yaml else None


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped_folder() -> Path:
    return Path(str(resources.files("atesd"))) / "recipes"


def find_recipe(name: str) -> Path:
    known = recipes()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(f"there is no file {name!r}; recipes that ship with atesd: {', '.join(known)}")
        return Path(name)
    raise ConfigError(
        f"there is no recipe {name!r}{suggest(name, known)}; those that ship with atesd: {', '.join(known)}. "
        f"For a file of yours, give its path, ending in .yaml"
    )


def read_own(path: Path) -> dict[str, Any]:
    """The lines of a file, without those of the one that it extends."""
    try:
        with path.open(encoding="utf-8") as file:
            settings = yaml.load(file, Loader=UniqueKeys) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: other bytes than UTF-8
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path} holds {type(settings).__name__}; it must hold lines of `field: value`")
    return dict(settings)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    settings = read_own(path)
    # `extends: NAME` (a recipe that ships, or a file beside this one) gives the settings this file does not name
    inherited = {}
    if parent := settings.pop("extends", None):
        beside = path.parent / str(parent)
        source = beside if beside.is_file() and beside != path else find_recipe(str(parent))
        if source.resolve() in (path.resolve(), *seen):
            raise ConfigError(f"extends is {parent!r} in {path}, which leads back to itself")
        inherited = read_yaml(source, (*seen, path.resolve()))
    hints = get_type_hints(ATESDConfig)
    for name, value in settings.items():
        if name not in hints:
            raise ConfigError(f"unknown key {name!r} in {path}{suggest(str(name), hints)}")
        if value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{name} is null in {path}; it must have a value, or leave the line out")
    if (
        path.resolve().parent == shipped_folder().resolve()
    ):  # a recipe's own files lie beside it; all other paths start from the shell
        beside = {name: path.parent / str(settings[name]) for name in PATHS if settings.get(name)}
        settings |= {name: str(file) for name, file in beside.items() if file.exists()}
    return inherited | settings


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name each key once; the plain loader silently takes the last. 2026-11-27 is a text."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, mark) in enumerate(keys):
            if key in [other for other, _ in keys[:index]]:
                raise ConfigError(f"{key!r} is set a second time, {str(mark).strip()}: leave one of them out")
        return super().construct_mapping(node, deep)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """YAML settings as flags, so that files and flags share one parser with its types and choices."""
    values = {name: value for name, value in settings.items() if value is not None}
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


USAGE = "atesd train RECIPE_OR_YAML [--flag value ...]\n       atesd train --resume RUN_DIR"


def config_parser(field_groups: tuple[type, ...] = groups.GROUPS, prog: str = "atesd train", usage: str = USAGE) -> Any:
    """The HfArgumentParser of a command; it raises ConfigError instead of ending the process."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise ConfigError(message)

        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Field[Any]) -> None:
            # HfArgumentParser hands all of a field's metadata to argparse, which refuses words of our own.
            shown = copy(field)
            shown.metadata = {"help": with_range(field.metadata), "aliases": field.metadata["aliases"]}
            before = len(parser._actions)
            HfArgumentParser._parse_dataclass_field(parser, shown)
            for action in parser._actions[before + 1 :]:  # --no_X, which repeats the help of --X
                action.help = f"Turn {field.name} off."

    return Parser(field_groups, prog=prog, usage=usage, allow_abbrev=False, formatter_class=HelpFormatter)


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows --learning_rate once, without its spelling --learning-rate, which works as well.

    Of --X and --no_X, only the first has the default.
    """

    def _get_help_string(self, action: Any) -> str | None:
        negative = any(name.startswith("--no_") for name in action.option_strings)
        return action.help if negative else super()._get_help_string(action)

    def _format_action_invocation(self, action: Any) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        value = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{', '.join(names)} {value}".rstrip()


def parse(parser: Any, flags: list[str], kind: type = ATESDConfig) -> Any:
    """The settings `flags` make, as a `kind`: the dataclass that holds all fields of the parser's groups."""
    *parts, rest = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        known = [field.name for field in fields(kind)]
        word = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        if not rest[0].startswith("-"):
            raise ConfigError(f"unexpected {rest[0]!r}: usage: {parser.usage}")
        raise ConfigError(f"unknown flag {rest[0]!r}{suggest(word, known)}; `{parser.prog} --help` lists them all")
    values: dict[str, Any] = {}
    for part in parts:
        values.update(vars(part))
    return kind(**values)
