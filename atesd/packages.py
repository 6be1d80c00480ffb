"""Packages that a command needs: missed at its start, and not where they are first imported."""

from __future__ import annotations

from importlib.util import find_spec

from atesd.errors import MissingPackageError

PIP_NAMES = {"math_verify": "math-verify", "comet_ml": "comet-ml"}  # where it is not the module's


def require_packages(what: str, *modules: str) -> None:
    """Raises MissingPackageError, with pip's command, for `modules` that `what` needs and that are not installed."""
    missing = [PIP_NAMES.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " ".join(missing)
        raise MissingPackageError(
            f"{what} needs {' and '.join(missing)}, which {verb} not installed: pip install {names}"
        )
