"""Manages the output folder of an evaluation: its settings, its samples, and whether it can be resumed.

This file guarantees that a killed evaluation resumes without repeating samples or mixing settings. The folder holds
`eval_config.json`, `samples.jsonl`, `results.json`, `results.md` and `results.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atesd.errors import AtesdError
from atesd.files import write_json
from atesd.reports.metrics import as_line, read_jsonl
from atesd.storage.folder import FolderInUse, OwnedFolder, make

SETTINGS, SAMPLES, RESULTS = "eval_config.json", "samples.jsonl", "results.json"
BLOCK, BLOCKS = 1 << 16, 64


class EvalError(AtesdError, ValueError):
    """An evaluation cannot start or resume. The message names the cause and the fix."""


class SampleFile:
    """`FOLDER/samples.jsonl`, locked by one process at a time. A context manager.

    If the context ends with an error before there is a sample, the folder is as if there had been no evaluation.

    Args:
        folder: existing folder of the evaluation.
        made: what `claim` made for it.

    Attributes:
        rows: the existing and appended samples. An incomplete last line, left by a kill, is removed from the file.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()):
        self.path = folder / SAMPLES
        try:
            self.folder = OwnedFolder(folder, made, take_over=False)
        except FolderInUse as error:
            raise EvalError(
                f"{folder} is being written by another evaluation: wait, or choose another output_dir"
            ) from error
        try:
            self.rows = read_jsonl(self.path)
        except json.JSONDecodeError as error:
            raise EvalError(f"{self.path} is damaged ({error}): remove the broken line, or delete {folder}") from error
        if self.path.exists():
            with self.path.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        self.file = self.path.open("a", encoding="utf-8")

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.file.writelines(as_line(row) for row in rows)
        self.file.flush()
        self.rows += rows

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.file.close()
        if kind is not None and not self.rows:
            self.folder.discard(SETTINGS, SAMPLES)
        self.folder.close()


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """Returns the seed of one sample, below 2^53. It does not depend on which other problems are selected.

    >>> sample_seed(0, "aime_2024-3", 0) == sample_seed(0, "aime_2024-3", 0) != sample_seed(0, "aime_2024-3", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}\n{problem_id}\n{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def claim(folder: Path, record: dict[str, Any], free: tuple[str, ...], defaults: dict[str, Any]) -> list[Path]:
    """Writes `record` to `folder`, after checking that it matches the settings already there, if any.

    Returns the folders that were made for it.

    Args:
        record: JSON values. `record["settings"]` holds the user's settings.
        free: names of settings, and of `record` entries, that may differ.
        defaults: the value of each setting that an existing folder does not name.

    Raises:
        EvalError: the folder holds an evaluation with other settings. The message lists the differences.
        ConfigError: the folder cannot be made or written to.
    """
    made = make(folder, "output_dir")
    path = folder / SETTINGS
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["settings"] = defaults | saved["settings"]  # an older version had fewer settings
        before = flat(saved, free)
        now = flat(json.loads(json.dumps(record)), free)
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differ:
            differences = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differ)
            raise EvalError(
                f"{folder} holds an evaluation with other settings: {differences}. Choose another --output_dir, use "
                f"the former settings to resume it, or delete it"
            )
    elif (folder / SAMPLES).exists():
        raise EvalError(f"{folder} holds {SAMPLES} but no {SETTINGS}: not an evaluation; choose another --output_dir")
    write_json(path, record)
    return made


def flat(record: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """{"settings": {"seed": 0}, "model": {"files": "x"}} -> {"seed": 0, "model files": "x"}, without `free` names."""
    rows: dict[str, Any] = {}
    for part, value in record.items():
        prefix = "" if part == "settings" else f"{part} "
        named = {f"{prefix}{name}": item for name, item in value.items()} if isinstance(value, dict) else {part: value}
        rows |= {name: item for name, item in named.items() if name not in free and part not in free}
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; {} if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
