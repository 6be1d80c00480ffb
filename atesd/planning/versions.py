"""Versions of installed packages, as reports and records name them. Separate so that all of them say the same."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str) -> str | None:
    """None where `package` is not installed. torch names its build, "2.11.0+cu130"; its metadata may leave that out."""
    if package == "torch":
        import torch

        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
