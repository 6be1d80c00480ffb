"""Uploads to the Hugging Face Hub, by huggingface_hub as it is. What can be refused is refused before the work.

And what to do where the Hub cannot be reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atesd.errors import AtesdError, ConfigError
from atesd.files import causes


class HubError(AtesdError, RuntimeError):
    """The Hub refused an upload, or could not be reached. What was to be uploaded is on the disk."""


def unreachable(error: Exception) -> str | None:
    """Says that the Hub cannot be reached, and what else to do, if that is what caused `error`; None otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = list(causes(error))
    failed = [each for each in found if isinstance(each, (ConnectionError, TimeoutError, LocalEntryNotFoundError))]
    if not failed:
        return None
    if constants.HF_HUB_OFFLINE:
        return (
            f"it is not in the cache ({constants.HF_HOME}), and HF_HUB_OFFLINE is set: unset it where there is a "
            "network, or give a folder or file of this machine"
        )
    told = [each for each in found if isinstance(each, OSError) and each.errno is not None]  # the system's own words
    return (
        f"the Hub cannot be reached ({(told or failed)[-1]}): give a folder or file of this machine. Or copy the cache "
        f"of a machine that has fetched it to {constants.HF_HOME}, and set HF_HUB_OFFLINE=1"
    )


def check_push(name: str) -> None:
    """Raises ConfigError for a name that no repository can have, and where there is no token. Asks no server."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub is {name!r}, which is no name of a repository: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub is {name!r}, and HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out")
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub is {name!r}, and there is no token for the Hub: run `hf auth login`, or set HF_TOKEN to a "
            "token that may write. Or leave push_to_hub out. (A resumed run uploads if it was started with push_to_hub)"
        )


def make_repository(name: str) -> None:
    """Makes the repository unless it is there: a token that may not write is found before the work, not after it.

    Raises:
        HubError: the Hub refuses it, or cannot be reached.
    """
    hub("create_repo", name, f"the repository {name!r} cannot be made or written to", exist_ok=True)


def push_folder(folder: Path, name: str) -> str:
    """Uploads the files of `folder`, and returns the address of the repository.

    Raises:
        HubError: the upload failed. It names the command that uploads the folder.
    """
    drop_local_base(folder / "README.md")
    make_repository(name)
    failed = f"{folder} is complete, but it was not uploaded; `hf upload {name} {folder}` tries again"
    hub("upload_folder", name, failed, folder_path=str(folder), ignore_patterns=[".*"])
    return f"https://huggingface.co/{name}"


def hub(call: str, name: str, failed: str, **arguments: Any) -> Any:
    """Calls a method of huggingface_hub's `HfApi`. Its errors become HubErrors, which begin with `failed`."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return getattr(huggingface_hub.HfApi(), call)(repo_id=name, **arguments)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{failed} ({type(error).__name__}: {error})") from error


def drop_local_base(card: Path) -> None:
    """Takes a base model that is a folder of this machine out of a model card: the Hub refuses such a card."""
    from huggingface_hub import ModelCard

    page = ModelCard.load(card) if card.is_file() else None
    if page and page.data.base_model and Path(str(page.data.base_model)).exists():
        page.data.base_model = None
        page.save(card)
