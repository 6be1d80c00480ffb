"""Opens a file, a folder or a Hub data set of problems. Rows are plain Python values, exactly as written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atesd.errors import DataError, MissingPackageError
from atesd.hub import unreachable

__all__ = ["open_dataset"]

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_EMPTY = "{} is empty: give data with a row for each problem"
_LIST_NAMES = ("data", "examples", "problems", "questions", "rows", "instances", "items")  # of {"data": [...]}


class Rows(list[dict[str, Any]]):
    """Rows in memory, with the `column_names` of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self for name in row))


def open_dataset(name_or_path: str, split: str) -> Any:
    """Returns a `datasets.Dataset` or `Rows`.

    Raises DataError, which says what to give, for what cannot be read.
    """
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or path.suffix in _READERS
    if looks_local and not path.exists():
        raise DataError(f"dataset_name: no such file or directory: {name_or_path}")
    if path.is_file() and path.suffix not in _READERS:
        raise DataError(f"dataset_name: {name_or_path} is none of {', '.join(_READERS)}")
    try:
        rows = _rows(path, name_or_path, split)
    except (DataError, MissingPackageError):
        raise
    except Exception as error:  # datasets raises a dozen types; the user needs the name, the split and the cause
        raise DataError(f"dataset_name: {_fault(path, name_or_path, split, error)}") from error
    if len(rows) == 0:
        raise DataError(f"dataset_name: {_EMPTY.format(name_or_path)}")
    return rows


def _rows(path: Path, name: str, split: str) -> Any:
    if path.is_file() and _READERS[path.suffix] == "json":
        _check_utf8(path)
    if path.is_file() and path.suffix == ".csv":
        return _read_csv(path)
    if path.is_file() and path.suffix == ".json" and (rows := _wrapped_rows(path, split)) is not None:
        return rows
    return _load(path, name, split)


def _fault(path: Path, name: str, split: str, error: Exception) -> str:
    """What is wrong with the data that could not be loaded, and what to do."""
    if _is_empty(path, error):
        return _EMPTY.format(name)
    cause = error.__cause__ or error  # datasets wraps what a reader says in "An error occurred"
    told = f"{type(cause).__name__}: {str(cause).rstrip('.')}"
    if path.is_file():
        damage = _json_damage(path) if _READERS[path.suffix] == "json" else None
        return f"{name} cannot be read: {damage or told}. Is the file complete, and of the kind that its name says?"
    if not path.exists() and (advice := unreachable(error)):
        return f"{name!r} is no file or folder here: {advice}"
    return (
        f"cannot load {name!r} (dataset_split={split!r}): {told}. Give a .jsonl, .json, .parquet or .csv file, a "
        "directory, or a Hub name ('org/name' or 'org/name:config')"
    )


def _is_empty(path: Path, error: Exception) -> bool:
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # datasets' words for no rows
        return True
    if not path.is_file():
        return False
    if path.suffix == ".parquet" and path.stat().st_size:
        from pyarrow import ArrowInvalid, parquet

        with suppress(ArrowInvalid):
            return parquet.read_metadata(path).num_rows == 0
        return False
    with path.open("rb") as file:
        return not any(line.strip(b"\xef\xbb\xbf \t\r\n") for line in file)


def _json_damage(path: Path) -> str | None:
    """Where the first value that is no JSON stands, in lines of the file: pyarrow counts from the start of a block."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    values = [text] if text.lstrip().startswith("[") else text.split("\n")  # one list, or a value a line
    for number, value in enumerate(values, 1):
        try:
            json.loads(value or "null")
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno - 1} is no JSON value ({error.msg}: column {error.colno})"
    return None


def _load(path: Path, name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("reading a dataset needs the datasets library: pip install datasets") from error
    if path.is_file():
        with _no_bars(datasets):  # "Generating train split": for a local file it is over at once
            return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(str(path))
        saved = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return saved.with_format(None)  # a saved set may give tensors or arrays
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split)
    hub_name, _, config = name.partition(":")
    return datasets.load_dataset(hub_name, config or None, split=split)


def _check_utf8(path: Path) -> None:
    """Raises DataError, which names the line: datasets finds out when a row is read, or not at all."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"dataset_name: {path} is not UTF-8: line {number} has the byte {line[error.start]:#04x}. Write it "
                    f"again in UTF-8, e.g. with iconv -f LATIN1 -t UTF-8"
                ) from error


@contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_csv(path: Path) -> Rows:
    """Reads text only: a reader that guesses types makes 7.0 of 7 in a column with gaps, and nothing of "N/A"."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = Rows(csv.DictReader(file, restval=""))
    for number, row in enumerate(rows):
        if None in row:
            raise DataError(f"row {number} of {path.name} has more fields than the header: quote its commas")
    return rows


def _wrapped_rows(path: Path, split: str) -> Rows | None:
    """Returns the rows of a file that is one object around them, {"data": [...]} or {"train": [...]}; else None."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError:  # an object a line
        return None
    for name in (split, *_LIST_NAMES):
        rows = content.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return Rows(rows)
    return None
