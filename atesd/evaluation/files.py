"""Manages the output folder of an evaluation: its settings, its samples, and whether it can be resumed.

This file guarantees that a killed evaluation resumes without repeating samples or mixing settings. The folder holds
`eval_config.json`, `samples.jsonl`, `results.json`, `results.md` and `results.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from atesd.errors import AtesdError, first_line
from atesd.files import write_json
from atesd.reports.metrics import as_line, whole_lines
from atesd.storage.folder import FolderInUse, OwnedFolder, make

SETTINGS, SAMPLES, RESULTS = "eval_config.json", "samples.jsonl", "results.json"
WRITTEN = (SAMPLES, RESULTS, "results.md", "results.html")
BLOCK, BLOCKS = 1 << 16, 64


class EvalError(AtesdError, ValueError):
    """An evaluation cannot start or resume. The message names the cause and the fix."""


class SampleFile:
    """`FOLDER/samples.jsonl`, locked by one process at a time. A context manager.

    If it ends with an error before there is a sample, the folder is as if there had been no evaluation.

    Args:
        folder: of the evaluation. It is made if it is absent.

    Attributes:
        rows: the existing samples, once `claim` has read them, and the appended ones.

    Raises:
        EvalError: another process writes the evaluation.
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path):
        self.path, self.rows, self.claimed = folder / SAMPLES, list[dict[str, Any]](), False
        made = make(folder, "output_dir")
        try:
            self.folder = OwnedFolder(folder, made, take_over=False)
        except FolderInUse as error:
            raise EvalError(
                f"{folder} is being written by another evaluation: wait, or choose another output_dir"
            ) from error

    def claim(self, record: dict[str, Any], free: tuple[str, ...], defaults: dict[str, Any]) -> None:
        """Compares `record` with the settings in the folder, if any, reads its samples, and then writes `record`.

        An incomplete last line, left by a kill, is removed from the samples.

        Args:
            record: JSON values. `record["settings"]` holds the user's settings.
            free: names of settings, and of `record` entries, that may differ.
            defaults: the value of each setting that an existing folder does not name.

        Raises:
            EvalError: the folder holds an evaluation with other settings, or damaged files. The message names them.
        """
        folder = self.folder.path
        settings = folder / SETTINGS
        if settings.is_file():
            check_same(read_record(settings, ("settings",)), record, free, defaults, folder)
        elif found := [name for name in WRITTEN if (folder / name).exists()]:
            raise EvalError(
                f"{folder} holds {found[0]} but no {SETTINGS}: not an evaluation; choose another --output_dir"
            )
        self.rows = read_samples(self.path)
        self.claimed = True
        write_json(settings, record)
        if self.path.exists():
            with self.path.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)

    def append(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(as_line(row) for row in rows)
        self.rows += rows

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        gone = not self.folder.path.exists()
        if kind is not None and not self.rows:
            self.folder.discard(*(SETTINGS, SAMPLES) if self.claimed else ())
        self.folder.close()
        if gone and isinstance(error, FileNotFoundError):
            raise EvalError(
                f"{self.folder.path} is no longer there: somebody removed or renamed it while the evaluation ran. Put "
                "it back and run the command again, which goes on from its samples"
            ) from error


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Returns the samples in a file; none if it does not exist. Skips an incomplete last line.

    Raises:
        EvalError: a line is not a sample of an evaluation.
    """
    rows = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
            fault = None if is_sample(row) else "it is no sample of an evaluation"
        except (ValueError, RecursionError) as error:
            row, fault = None, first_line(error)
        if fault:
            raise EvalError(
                f"line {number} of {path} is damaged ({fault}): remove that line, and its sample is made again, or "
                f"choose another --output_dir"
            )
        rows.append(row)
    return rows


def is_sample(row: Any) -> bool:
    """Whether `row` has what results are made of. Samples of an older version lack fields that came later."""
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("problem_id", "text", "finish_reason"))
        and all(type(row.get(name)) is int for name in ("sample", "seed", "num_tokens"))
        and type(row.get("correct")) is bool
        and isinstance(row.get("extracted", False), str | None)
    )


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """Returns the seed of one sample, below 2^53. It does not depend on which other problems are selected.

    >>> sample_seed(0, "aime_2024-3", 0) == sample_seed(0, "aime_2024-3", 0) != sample_seed(0, "aime_2024-3", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}\n{problem_id}\n{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def check_same(
    saved: dict[str, Any], record: dict[str, Any], free: tuple[str, ...], defaults: dict[str, Any], folder: Path
) -> None:
    """Raises EvalError if two records differ in anything but `free`."""
    saved["settings"] = defaults | saved["settings"]  # an older version had fewer settings
    before, now = flat(saved, free), flat(json.loads(json.dumps(record)), free)
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ:
        differences = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differ)
        raise EvalError(
            f"{folder} holds an evaluation with other settings: {differences}. Choose another --output_dir, use "
            f"the former settings to resume it, or delete it"
        )


def flat(record: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """{"settings": {"seed": 0}, "model": {"files": "x"}} -> {"seed": 0, "model files": "x"}, without `free` names."""
    rows: dict[str, Any] = {}
    for part, value in record.items():
        prefix = "" if part == "settings" else f"{part} "
        named = {f"{prefix}{name}": item for name, item in value.items()} if isinstance(value, dict) else {part: value}
        rows |= {name: item for name, item in named.items() if name not in free and part not in free}
    return rows


def read_record(path: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """Returns the content of a JSON file that an evaluation has written, an object that has the objects `parts`.

    Raises:
        EvalError: it is damaged.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        missing = [part for part in parts if not isinstance(content.get(part), dict)]
        fault = f"it has no {missing[0]}" if missing else None
    except (ValueError, RecursionError, TypeError) as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault:
        raise EvalError(
            f"{path} is damaged ({fault}): restore it from a copy, or delete it and run the evaluation again"
        )
    return content


def fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """Returns a digest of the files of a model or adapter; None if `folder` is not a local folder.

    Reads only 64 evenly spaced blocks of a large file. This still detects training, since an update changes
    every weight, and avoids reading e.g. 16 GB."""
    if not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin", ".json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= BLOCK * BLOCKS:
                digest.update(file.read())
                continue
            for block in range(BLOCKS):
                file.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
