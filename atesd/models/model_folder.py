"""The folder that a whole model is written into: absent or empty before, complete after, and usable only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atesd.errors import ConfigError
from atesd.files import clear, fsync, share_with_readers
from atesd.models.loading import bars_of_long_loads
from atesd.storage.folder import LOCK, OwnedFolder, own_new

MODEL_FILE, STAGING = "config.json", ".writing-files"
SHARD_SIZE = "5GB"


def own_empty(path: Path) -> OwnedFolder:
    """Makes and owns the output folder. Raises ConfigError if there is anything in it."""
    refuse_content(path)
    folder = own_new(path, (), "output_dir")
    try:
        refuse_content(path)  # another process may have written it in between
    except ConfigError:
        folder.close()
        raise
    clear(path / STAGING)
    return folder


def refuse_content(path: Path) -> None:
    found = [each.name for each in path.iterdir() if each.name not in (LOCK, STAGING)] if path.is_dir() else []
    if found:
        raise ConfigError(f"output_dir is {str(path)!r}, which holds {found[0]}: give a folder that is absent or empty")


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes all files. config.json comes last: without it nothing loads the rest."""
    with filled(folder, last=MODEL_FILE) as staging:
        save_model(model, tokenizer, staging)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    with bars_of_long_loads():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    share_with_readers(folder)


@contextmanager
def filled(folder: Path, last: str) -> Iterator[Path]:
    """Yields a folder to write into. At the end its content moves into `folder`, `last` after all else.

    All of it is on the device before it moves. If there is an error, nothing of it stays.
    """
    staging = folder / STAGING
    try:
        staging.mkdir()
        yield staging
        for path in staging.rglob("*"):
            fsync(path)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == last):
            path.rename(folder / path.name)
    finally:
        clear(staging)
    fsync(folder)
