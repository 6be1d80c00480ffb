"""Checks the settings of the teacher: one that is missing, does nothing, or cannot work with the others."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from atesd.config.fields import Settings
from atesd.config.mixture import views_of
from atesd.errors import ConfigError

# The settings `teacher_*` of a teacher that is a model of its own: what they are if left out, and whose they are.
OWN_SETTINGS: dict[str, tuple[object, tuple[str, ...]]] = {
    "model_name_or_path": (None, ("model", "vllm_server")),
    "weights": ("bfloat16", ("model",)),
    "device": (None, ("model",)),
    "base_url": (None, ("vllm_server",)),
    "top_k": (64, ("vllm_server",)),
    "tail": ("bucket", ("vllm_server",)),
}


def check_teacher(config: Settings) -> None:
    """Raises ConfigError for settings of a teacher that is a model of its own: one missing, or some that do nothing."""
    for name, (usual, kinds) in OWN_SETTINGS.items():
        value = getattr(config, f"teacher_{name}")
        if value != usual and config.teacher not in kinds:
            raise ConfigError(
                f"teacher_{name} ({value}) would be ignored, for teacher is {config.teacher!r}: leave it out, or set "
                f"teacher to {kinds[0]!r}"
            )
    check = {"model": check_model, "vllm_server": check_server}.get(config.teacher)
    if check is not None:
        check(config)


def check_model(config: Settings) -> None:
    path, device = config.teacher_model_name_or_path, config.teacher_device
    if not (path or "").strip():
        raise ConfigError(
            f"teacher is 'model', and teacher_model_name_or_path is {path!r}: set it to the folder or Hub id of the "
            "model that teaches"
        )
    check_has_teacher(config, "model_name_or_path")
    if device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise ConfigError(f"teacher_device is {device!r}; it must be a device of torch, such as 'cuda:1' or 'cpu'")


def check_server(config: Settings) -> None:
    """Raises ConfigError for what a teacher cannot do that is known by the log-probabilities of its top K tokens."""
    url, views = config.teacher_base_url, views_of(config)[0]
    if not is_web_address(url):
        raise ConfigError(
            f"teacher is 'vllm_server', and teacher_base_url is {url!r}: set it to the address of the server, such as "
            "http://localhost:8001"
        )
    check_has_teacher(config, "base_url")
    if len(views) > 1:
        raise ConfigError(
            f"teacher_views is {config.teacher_views}, and teacher is 'vllm_server': views are mixed by their logits, "
            "and a server sends those of its top tokens only. Give one view, or set teacher to 'model'"
        )
    exact = config.teacher_tail == "renormalise" and config.objective != "policy_gradient"
    if config.scoring_temperature != 1 and not exact:
        otherwise = "" if config.objective == "policy_gradient" else ", or teacher_tail to 'renormalise'"
        raise ConfigError(
            f"scoring_temperature is {config.scoring_temperature}, and a teacher behind a server gives "
            f"log-probabilities at temperature 1: set scoring_temperature to 1{otherwise}"
        )


def check_has_teacher(config: Settings, name: str) -> None:
    if config.objective in ("sft", "grpo"):
        value = getattr(config, f"teacher_{name}")
        raise ConfigError(
            f"objective {config.objective!r} has no teacher, so teacher_{name} ({value}) would be ignored: "
            "leave it and teacher out"
        )


def is_web_address(url: str | None) -> bool:
    try:
        parts = urlsplit(url or "")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or half an IPv6 address
        return False
