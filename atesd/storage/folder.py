"""The owner of a folder: one process at a time writes there, and only into what a process of its kind has made.

The owner holds a lock on FOLDER/.lock. The lock ends with its process, however that ends, so nothing is left to clean.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from atesd.errors import AtesdError, ConfigError
from atesd.files import STORAGE_FAULTS

LOCK = ".lock"


class FolderInUse(AtesdError, RuntimeError):
    """Another process writes to the folder."""


class OwnedFolder:
    """A folder that this process owns until `close`. A context manager.

    Within a process the newest object owns it: a run that failed in a notebook does not keep the next one out.
    With `take_over=False` it is refused there too.

    Attributes:
        path: the folder.
        made: the folders that were made for it: itself first, then those above. Empty if it was there.
    """

    def __init__(self, path: Path, made: Sequence[Path] = (), take_over: bool = True):
        self.path, self.made = path, made
        if take_over:
            for earlier in [folder for folder in _owned if folder.path.resolve() == path.resolve()]:
                earlier.close()
        self.lock = lock(path)
        _owned.add(self)

    def close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def discard(self, *names: str) -> None:
        """Give the folder up as if it had never been: remove its files and empty folders `names`, and what was made.

        A folder that holds anything else stays.
        """
        for name in (*names, LOCK):
            with suppress(OSError):
                (self.path / name).rmdir() if (self.path / name).is_dir() else (self.path / name).unlink()
        with suppress(OSError):  # the first that is not empty, and all above it, stay
            for made in self.made:
                made.rmdir()
        self.close()

    def __enter__(self) -> OwnedFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def own_new(path: Path, used: tuple[str, ...], setting: str, numbered: bool = False) -> OwnedFolder:
    """Makes a folder and owns it. An existing folder without any of `used` will do.

    Args:
        path: the folder to make.
        used: names of files and folders that its owner will write, and must not find there.
        setting: what the user calls the folder, e.g. "output_dir".
        numbered: take PATH-2, PATH-3, ... instead of a folder that is there.

    Raises:
        ConfigError: the folder cannot be made, or is in use, or holds one of `used`.
    """
    chosen, number, made = path, 1, make(path, setting)
    while numbered and not made:
        number += 1
        chosen = path.with_name(f"{path.name}-{number}")
        made = make(chosen, setting)
    try:
        folder = OwnedFolder(chosen, made)
    except FolderInUse as error:
        raise ConfigError(f"{setting} is {str(path)!r}, but {error}") from error
    found = [name for name in used if (chosen / name).exists()]
    if found:
        folder.close()
        raise ConfigError(already_holds(setting, path, found[0]))
    return folder


def already_holds(setting: str, path: Path | str, name: str) -> str:
    return (
        f"{setting} {str(path)!r} already holds {name}, of a run or of yours: go on with a run by --resume {path}, "
        "or choose another folder"
    )


def own(path: Path, setting: str) -> OwnedFolder:
    """Owns a folder, which is made if it is absent.

    Raises:
        ConfigError: it cannot be made or written to.
        FolderInUse: another process owns it.
    """
    return OwnedFolder(path, make(path, setting))


def make(path: Path, setting: str) -> list[Path]:
    """Makes a folder and those above it. Returns those that were absent, itself first; none if it was there.

    Of several processes that make the same folder, one is told that it was absent.

    Raises:
        ConfigError: the system refuses it, or something else has that name.
    """
    try:
        above = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
            return [path, *above]
        except FileExistsError:
            if not path.is_dir():
                raise
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        number, name = getattr(error, "errno", None), getattr(error, "filename", None)
        why = STORAGE_FAULTS.get(number) or (os.strerror(number) if number else str(error)).lower()
        where = f" at {name!r}" if name and str(name) != str(path) else ""
        fault = not_a_folder(path) or f"{why}{where}"
        raise ConfigError(
            f"{setting} is {str(path)!r}, which cannot be made or written to ({fault}): choose another folder"
        ) from error
    return []


def not_a_folder(path: Path) -> str | None:
    """Says what stands in the place of `path`, or of a folder above it, if it is no folder."""
    for each in (path, *path.parents):
        if os.path.lexists(each):
            if os.path.isdir(each):
                return None
            what = "a file, not a folder" if os.path.exists(each) else "a link to nothing"
            return f"{'it' if each == path else repr(str(each))} is {what}"
    return None


def lock(folder: Path) -> int:
    """Returns the descriptor of the locked FOLDER/.lock.

    Raises:
        FolderInUse: another process holds the lock.
    """
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be made or written to ({error.strerror}): choose another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise FolderInUse(
                f"{folder} is being written by another process{f' ({owner})' if owner else ''}: wait until it has "
                "ended, or choose another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): the file system has no locks. Choose another folder"
            ) from error
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)  # its owner removed the file in between: what we locked is no longer there
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


_owned: weakref.WeakSet[OwnedFolder] = weakref.WeakSet()


def close_in_child() -> None:
    """A forked child, a grader for instance, must not hold the lock on when its parent has died."""
    for folder in list(_owned):
        folder.close()


os.register_at_fork(after_in_child=close_in_child)
