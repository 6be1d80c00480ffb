"""Errors whose message is enough: it names the value seen and what to do, so the command line shows no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AtesdError(Exception):
    """Base of the errors that atesd raises for its users. Each has a built-in error as its second base."""


class ConfigError(AtesdError, ValueError):
    """A setting that cannot be used: the message names it, the value seen and what to do."""


class DataError(AtesdError, ValueError):
    """Problems, references, prompts or templates that cannot be used."""


class ModelError(AtesdError, ValueError):
    """A model or tokenizer that cannot be used here."""


class ModelFetchError(AtesdError, RuntimeError):
    """The quickstart's model could not be fetched or converted."""


class StorageError(AtesdError, OSError):
    """The disk is full or cannot be written to."""


class MissingPackageError(AtesdError, ImportError):
    """A package that a setting needs is not installed."""


def suggest(word: str, known: Iterable[str]) -> str:
    """What follows a mistyped word in a message, in brackets: the message may go on behind it.

    >>> suggest("foward_kl", ["forward_kl", "jsd"])
    ' (did you mean forward_kl?)'
    >>> suggest("squared", ["forward_kl", "jsd"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
