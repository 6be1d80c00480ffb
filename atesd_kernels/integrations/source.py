"""Whether another library's functions are the ones an adapter was written against, and how to reuse one of them.

Apart from the adapters because it knows none of them. A version number says too little: a loss can change in a patch
release, and most releases leave it alone.
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
    """For a message. A library that is only on the path has no metadata."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def fingerprint(function: Callable) -> str:
    """12 hex digits of `function`'s source without comments, docstring and indentation."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    node: Any = ast.parse("\n".join(lines)).body[0]
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        del lines[first.lineno - 1 : first.end_lineno]
    code = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def unexpected(cls: type, name: str, expected: dict[str, str]) -> list[str]:
    """Which of the functions in `expected` (name -> fingerprint) are missing or differ.

    Each is looked up as a method of `cls`, so that a subclass's own counts, then in the module of its base `name`.
    """
    module = next(inspect.getmodule(c) for c in cls.__mro__ if c.__name__ == name)
    differing = []
    for function, digits in expected.items():
        found = getattr(cls, function, None) or getattr(module, function, None)
        try:
            same = found is not None and fingerprint(inspect.unwrap(found)) == digits
        except OSError:  # no source at hand
            same = False
        if not same:
            differing.append(function)
    return differing


def is_as_expected(cls: type, name: str, expected: dict[str, str], library: str, version: str) -> bool:
    """Whether nothing is `unexpected`; warns, with both versions of `library`, where something is."""
    differing = unexpected(cls, name, expected)
    if differing:
        warnings.warn(
            f"{name} is left as it is: {', '.join(differing)} of {cls.__name__} in the installed {library} "
            f"{installed_version(library)} differ from {library} {version}, which this adapter was written "
            f"for. Install {library}=={version}.",
            stacklevel=3,
        )
    return not differing


def with_globals(owner: Any, method: str, **replaced: Any) -> Callable:
    """The method of `owner`'s class, bound to `owner`, with functions of its module exchanged for this object only."""
    f = getattr(type(owner), method)
    copy = types.FunctionType(f.__code__, {**f.__globals__, **replaced}, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return types.MethodType(copy, owner)
