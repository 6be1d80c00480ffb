"""`option` defines a configuration field: its default, source, help and range. `check_fields` checks the values.

fields.py (settings of a run) and eval_config.py (settings of an evaluation) both use it.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from atesd.errors import ConfigError, suggest

SOURCES = """\
Where a default comes from: [paper] ATESD, arXiv 2605.11458; [OPSD] arXiv 2601.18734, settings of March 2026; [HF] the
name and default of Hugging Face's transformers or TRL; [our choice] this project's, where the papers give no number"""
JSON_OBJECT = 'a JSON object like {"key": true}'
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold. An end that is None is open.

    >>> str(Range(above=0, at_most=1)), 0 in Range(above=0, at_most=1)
    ('above 0 and at most 1', False)
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        ends = {name.replace("_", " "): end for name, end in vars(self).items() if end is not None}
        return " and ".join(f"{name} {end}" for name, end in ends.items())


def option(
    default: Any,
    source: str,
    help: str,
    *aliases: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    between: tuple[float, float] | None = None,
    zero_is_off: bool = False,
    json_object: bool = False,
) -> Any:
    """A field of the configuration.

    Args:
        default: its default.
        source: where the default comes from; see `SOURCES`.
        help: what it does, for `--help`.
        aliases: further flags.
        at_least, above, at_most, below, between: the range of its numbers; `between` includes both ends.
        zero_is_off: 0 means "off" and becomes None.
        json_object: it is the text of a JSON object.
    """
    if between is not None:
        at_least, at_most = between
    return field(
        default=default,
        metadata={
            "help": f"[{source}] {help}",
            "aliases": list(aliases),
            "range": Range(at_least, above, at_most, below),
            "zero_is_off": zero_is_off,
            "json_object": json_object,
        },
    )


def with_range(metadata: Mapping[str, Any]) -> str:
    """The help of a field and, where it has one, its range.

    >>> with_range(option(64, "OPSD", "LoRA rank.", at_least=1).metadata)
    '[OPSD] LoRA rank. Range: at least 1.'
    """
    bounds = str(metadata["range"])
    return f"{metadata['help']} Range: {bounds}." if bounds else metadata["help"]


def switch_off_zeros(config: Any) -> None:
    """Set the fields with `zero_is_off` that are 0 to None."""
    for each in fields(config):
        if each.metadata["zero_is_off"] and getattr(config, each.name) == 0:
            setattr(config, each.name, None)


def check_fields(config: Any) -> None:
    """Raises ConfigError for the first field whose value is not of its type, among its choices or in its range."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        value = getattr(config, each.name)
        if what := violation(value, hints[each.name], each.metadata):
            raise ConfigError(f"{each.name} is {value!r}; it must be {what}")


def violation(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns what `value` must be, if it violates the type hint, choices or range; else "".

    >>> violation("emma", Literal["frozen", "ema"], option(None, "our choice", "").metadata)
    'frozen or ema (did you mean ema?)'
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return ""
    or_absent = ", or 0 for off" if metadata["zero_is_off"] else ", or left out" if type(None) in kinds else ""
    (kind,) = (kind for kind in kinds if kind is not type(None))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return ""
        names = [str(choice) for choice in choices]
        return (" or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}") + suggest(str(value), names)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        return (f"the text of {JSON_OBJECT}" if metadata["json_object"] else KINDS[kind]) + or_absent
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if kind in (int, float) and value not in metadata["range"]:
        return f"{metadata['range']}{or_absent}"
    if metadata["json_object"] and not isinstance(parse_json(value), dict):
        return JSON_OBJECT
    return ""


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
