"""Atomic, durable writes of small files, digests of files, and what the errors of a storage device mean.

Settings, reports, evaluations and studies write through here. Large states go through `storage/checkpoint.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What is wrong with the place and not with the run: the run saved so far stays valid.
STORAGE_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EIO: "the device failed",
}


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path`. A reader, and a power cut, finds the old content or the new, never a part.

    It makes no folder: a run's that was removed would be made again unnoticed. A lone surrogate, which UTF-8 does not
    have, is written as its escape; in JSON that is the character again.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # unique per process: writes may be concurrent
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        fsync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its place at the end.

    All of it is on the device before the old one, if any, gives way.
    """
    staging = target.with_name(f".writing-{target.name}")
    clear(staging)
    staging.mkdir()
    yield staging
    for path in (*staging.rglob("*"), staging):
        fsync(path)
    old = target.with_name(f".replaced-{target.name}")
    clear(old)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    fsync(target.parent)
    clear(old)


def clear(path: Path) -> None:
    """Removes what a killed process has left under one of our names, folder or file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def share_with_readers(folder: Path) -> None:
    """Gives the files of a folder the permissions of any new file. safetensors lets its owner alone read its files, so
    that neither a colleague nor a server of another user could."""
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields `error` and the errors it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def storage_fault(error: BaseException | None) -> str | None:
    """What is wrong with the storage, if that caused `error`; None otherwise.

    torch and safetensors wrap the operating system's error, and keep its text only.

    >>> storage_fault(OSError(errno.ENOSPC, "No space left on device"))
    'the disk is full'
    >>> storage_fault(ValueError("no"))
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in STORAGE_FAULTS:
            return STORAGE_FAULTS[cause.errno]
        for number, fault in STORAGE_FAULTS.items():
            if f"{os.strerror(number)} (os error {number})" in str(cause) or (
                number == errno.ENOSPC and os.strerror(number) in str(cause)
            ):
                return fault
    return None
