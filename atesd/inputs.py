"""What a run reads, as digests: a run that goes on must read what it started with.

RUN_DIR/inputs.json holds them. The settings name files and folders; these digests are of what was in them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atesd.config import ATESDConfig
from atesd.data.run_data import RunData
from atesd.errors import ConfigError
from atesd.evaluation.files import fingerprint
from atesd.files import write_json
from atesd.models.loading import ModelSource, load_model_config, model_path
from atesd.models.other_teacher import teacher_source

INPUTS = "inputs.json"
BASE_FILES, TEACHER_FILES = "the base model's files", "the teacher's files"
SERVED_TEACHER = "the model at teacher_base_url"  # its name: nothing else is known of it


def input_digests(config: ATESDConfig, data: RunData, tokenizer: Any) -> dict[str, str | None]:
    """A digest of each thing that a run reads, under a name for people. Problems count in their order."""
    problems = {
        "the training problems": data.problems.train,
        "the probe problems": data.problems.probe,
        "the evaluation problems": data.problems.eval,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    source = teacher_source(config)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return {
        **{name: f"{len(rows)}: {digest([row.record() for row in rows])}" for name, rows in problems.items()},
        "the tokenizer": digest([words, tokenizer.special_tokens_map]),
        "the chat template": digest(tokenizer.chat_template),
        "the prompt templates": digest(asdict(data.prompts.templates)),
        BASE_FILES: weights_digest(config),
        **({} if source is None else {TEACHER_FILES: weights_digest(source)}),
    }


def digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def weights_digest(config: ATESDConfig | ModelSource) -> str | None:
    """A digest of a local model's files; the commit of a model from the Hub; None if neither is known."""
    local = fingerprint(model_path(config.model_name_or_path))
    return local or getattr(load_model_config(config), "_commit_hash", None)


def read_inputs(run_dir: Path) -> tuple[dict[str, str | None], list[str]]:
    """Returns the digests in RUN_DIR/inputs.json, and what has changed since the run was started.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read.
    """
    path = run_dir / INPUTS
    try:
        saved = json.loads(path.read_bytes())
        return dict(saved["digests"]), list(saved["changed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), so nothing says what the run has read: restore the file, or delete it "
            "to go on with the inputs as they are"
        ) from error


def keep_inputs(run_dir: Path, now: dict[str, str | None], allow_changed: bool) -> list[str]:
    """Compares with RUN_DIR/inputs.json, writes it if absent or changed. Returns all that changed since the start.

    Raises:
        ConfigError: something differs from what the run last went on with, and `allow_changed` is False.
    """
    path = run_dir / INPUTS
    try:
        before, changed = read_inputs(run_dir)
    except FileNotFoundError:
        before, changed = now, []
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ and not allow_changed:
        raise ConfigError(
            f"the run in {str(run_dir)!r} has read other inputs: {'; '.join(differ)} changed since. Restore them, or "
            "go on with --allow_changed_inputs, which summary.json will tell"
        )
    changed += [name for name in differ if name not in changed]
    if differ or not path.exists():
        write_json(path, {"digests": now, "changed": changed})
    return changed
