"""The folder that a whole model is written into: absent or empty before, complete after, and loadable only then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from atesd.errors import ConfigError
from atesd.files import fsync, share_with_readers
from atesd.storage.folder import LOCK, OwnedFolder, own_new

MODEL_FILE, STAGING = "config.json", ".writing-merged"
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
    shutil.rmtree(path / STAGING, ignore_errors=True)  # of a merge that was killed
    return folder


def refuse_content(path: Path) -> None:
    found = [each.name for each in path.iterdir() if each.name not in (LOCK, STAGING)] if path.is_dir() else []
    if found:
        raise ConfigError(f"output_dir is {str(path)!r}, which holds {found[0]}: give a folder that is absent or empty")


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes beside, then moves the files into `folder`; config.json comes last: without it nothing loads the rest."""
    staging = folder / STAGING
    model.save_pretrained(staging, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(staging)
    share_with_readers(staging)
    files = sorted(staging.iterdir(), key=lambda path: path.name == MODEL_FILE)
    for path in files:
        fsync(path)
    for path in files:
        path.rename(folder / path.name)
    staging.rmdir()
    fsync(folder)
