"""The folder of an evaluation: its settings, its samples as they come, and what may go on in it.

Separate from evaluate.py because the promise (a killed evaluation goes on without repeating or mixing anything) is kept
here. Layout of the folder: `eval_config.json`, `samples.jsonl`, `results.json`, `results.md` and `results.html`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from atesd.files import write_json
from atesd.reports.metrics import as_line, read_jsonl

SETTINGS, SAMPLES, RESULTS = "eval_config.json", "samples.jsonl", "results.json"
BLOCK, BLOCKS = 1 << 16, 64


class EvalError(ValueError):
    """An evaluation that cannot start or go on: the message says why and what to do."""


class SampleFile:
    """`FOLDER/samples.jsonl`, held by one process at a time; a context manager.

    Args:
        folder: of the evaluation; it exists.

    Attributes:
        rows: the samples that were there, a last line cut off by a kill left out (and removed).
    """

    def __init__(self, folder: Path):
        self.path = folder / SAMPLES
        self.lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
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

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.lock.close()


def seed_of(seed: int, problem_id: str, sample: int) -> int:
    """The seed of one sample, below 2^53: a function of these three alone, so it is the same in any selection.

    >>> seed_of(0, "aime_2024-3", 0) == seed_of(0, "aime_2024-3", 0) != seed_of(0, "aime_2024-3", 1)
    True
    """
    digest = hashlib.sha256(f"{seed}\n{problem_id}\n{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def claim(folder: Path, record: dict[str, Any], free: tuple[str, ...]) -> None:
    """Writes `record` as the settings of `folder`, or checks that those already there are the same.

    Args:
        record: JSON values; `record["settings"]` are the user's.
        free: names of settings that may differ, and `record` entries that may.

    Raises:
        EvalError: the folder holds an evaluation with other settings; each difference is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.is_file():
        before = flat(json.loads(path.read_text(encoding="utf-8")), free)
        now = flat(json.loads(json.dumps(record)), free)
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differ:
            told = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differ)
            raise EvalError(
                f"{folder} holds an evaluation with other settings: {told}. Choose another --output_dir, give the "
                f"former settings to go on with it, or delete it"
            )
    elif (folder / SAMPLES).exists():
        raise EvalError(f"{folder} holds {SAMPLES} but no {SETTINGS}: it is no evaluation; choose another --output_dir")
    write_json(path, record)


def flat(record: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """{"settings": {"seed": 0}, "model": {"files": "..."}} -> {"seed": 0, "model files": "..."}, without the free."""
    rows: dict[str, Any] = {}
    for part, value in record.items():
        prefix = "" if part == "settings" else f"{part} "
        named = {f"{prefix}{name}": item for name, item in value.items()} if isinstance(value, dict) else {part: value}
        rows |= {name: item for name, item in named.items() if name not in free and part not in free}
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """A digest of a model's or adapter's files that changes with training; None for what is not a local folder.

    Of large files 64 blocks are read, evenly spaced: an update moves every weight, and 16 GB need not be read.
    """
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
