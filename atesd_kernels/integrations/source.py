"""Checks that another library's functions have the source an adapter was written for, and reuses such functions.

It compares source, not version numbers: a loss can change in a patch release, and most releases do not change it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import textwrap
import types
import warnings
from collections.abc import Callable
from typing import Any


def installed_version(library: str) -> str:
    """Returns the version, for messages. A library that is only on the path has no metadata."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def fingerprint(function: Callable) -> str:
    """Returns 12 hex digits of a hash of `function`'s source, without comments, docstring and indentation."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    node: Any = ast.parse("\n".join(lines)).body[0]
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        del lines[first.lineno - 1 : first.end_lineno]
    code = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def unexpected(cls: type, name: str, expected: dict[str, str]) -> list[str]:
    """Returns those functions of `expected` (name -> fingerprint) that are missing or differ.

    Looks up each as a method of `cls` (a subclass may override it), then in the module of its base class `name`.
    """
    module = next(inspect.getmodule(c) for c in cls.__mro__ if c.__name__ == name)
    differing = []
    for function, digits in expected.items():
        found = getattr(cls, function, None) or getattr(module, function, None)
        try:
            same = found is not None and fingerprint(inspect.unwrap(found)) == digits
        except OSError:  # source is not available
            same = False
        if not same:
            differing.append(function)
    return differing


class UnexpectedSourceError(RuntimeError):
    """An installed library's functions differ from those an adapter was written for."""


def is_as_expected(
    cls: type, name: str, expected: dict[str, str], library: str, version: str, strict: bool = False
) -> bool:
    """Returns whether nothing is `unexpected`. If something is, warns, or raises if `strict`."""
    differing = unexpected(cls, name, expected)
    if differing:
        message = (
            f"{name} is unchanged: {', '.join(differing)} of {cls.__name__} in the installed {library} "
            f"{installed_version(library)} differ from {library} {version}, which this adapter was written "
            f"for. Install {library}=={version}."
        )
        if strict:
            raise UnexpectedSourceError(message)
        warnings.warn(message, stacklevel=3)
    return not differing


def with_globals(owner: Any, method: str, **replaced: Any) -> Callable:
    """Returns a copy of the method, bound to `owner`, in which functions of the method's module are replaced."""
    f = getattr(type(owner), method)
    copy = types.FunctionType(f.__code__, {**f.__globals__, **replaced}, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return types.MethodType(copy, owner)
