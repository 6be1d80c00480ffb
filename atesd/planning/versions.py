"""Versions of installed packages, for all reports and records."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str) -> str | None:
    """Returns the version, or None if not installed. torch's includes its build ("2.11.0+cu130"); metadata may not."""
    if package == "torch":
        import torch

        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
