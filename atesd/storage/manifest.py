"""The digests of a folder's files, so that damage is seen before anything is built from them."""

from __future__ import annotations

import json
from pathlib import Path

from atesd.files import sha256

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes FOLDER/manifest.json: the SHA-256 of every file in `folder` and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What of `folder` differs from its manifest, e.g. "state.pt has changed"; None if it is whole."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())["sha256"]
        for name, digest in digests.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None
