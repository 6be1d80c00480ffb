"""The settings that take code of yours: `divergence`, `exposure_policy`, `rollout_engine` and `metrics`, as
`module:object`.

| setting           | the object                      | it is called with                                     |
|-------------------|---------------------------------|-------------------------------------------------------|
| `divergence`      | is a `DivergenceTerm`           |                                                       |
| `exposure_policy` | makes an `ExposurePolicy`       | the `POLICY_SETTINGS` it names, and `exposure_kwargs` |
| `rollout_engine`  | makes a `RolloutEngine`         | config, model, tokenizer, processes, `rollout_kwargs` |
| `metrics` (eval)  | is a metric of one problem      | the problem's samples                                 |

checks.py validates through this file, and the parts of a run later load the same objects through it. A registered name
imports nothing. `module:object` imports your module, and torch if your module needs it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any

from atesd.errors import ConfigError, suggest

# The names that atesd ships. Tests compare them with the registries, which take seconds to import.
NAMES = {
    "divergence": tuple("forward_kl reverse_kl jsd jeffreys skew_kl skew_reverse_kl total_variation alpha".split()),
    "exposure_policy": tuple("atesd one_step full fixed random linear cosine".split()),
    "rollout_engine": ("hf", "vllm", "vllm_server"),
}
REGISTRIES = {
    "divergence": ("atesd_kernels.divergences", "_REGISTRY"),
    "exposure_policy": ("atesd.exposure.policies", "BUILDERS"),
    "rollout_engine": ("atesd.rollout.make", "ENGINES"),
}
# The fields of the configuration that a run offers to its exposure policy, under these names.
POLICY_FIELDS = (
    "max_steps hold_window lookahead policy_batch_size reward_gamma lambda_gt progress_signal alpha_min alpha_max "
    "policy_learning_rate policy_hidden_size entropy_target entropy_coef fixed_alpha seed"
).split()
# `per_example` is the field per_example_exposure.
POLICY_SETTINGS = (*POLICY_FIELDS, "per_example")
# What the policies that atesd ships take beside the run's settings.
POLICY_KWARGS = {"linear": ("start_alpha", "end_alpha"), "cosine": ("start_alpha", "end_alpha")}
# What a run calls. Tests compare them with the protocols.
POLICY_METHODS = ("alpha", "alphas", "observe", "finish", "state_dict", "load_state_dict")
ENGINE_METHODS = ("sync", "generate", "release", "close", "state_dict", "load_state_dict")
ENGINE_ARGUMENTS = ("config", "model", "tokenizer", "processes")


def is_object(text: str) -> bool:
    """Whether `text` names an object of a module, and not something registered."""
    return ":" in text


def registry(field: str) -> Mapping[str, Any]:
    """What code of this process has registered for `field`; empty before the registry is imported."""
    module, name = REGISTRIES[field]
    return getattr(sys.modules.get(module), name, {})


def check_name(field: str, text: str) -> None:
    """Raises ConfigError unless `text` is a registered name or has the form of `module:object`."""
    names = dict.fromkeys([*NAMES[field], *registry(field)])
    if not is_object(text) and text not in names:
        raise ConfigError(
            f"{field} is {text!r}; it must be one of {', '.join(names)}, or module:object, your own"
            f"{suggest(text, names)}"
        )


def load_object(text: str, field: str) -> Any:
    """The object that `text`, as in "my_policy:Alternating", names. Modules of the working directory are found too.

    Args:
        text: module and object, as an import statement would write them, with a colon between.
        field: what the error says `text` was given for.

    Raises:
        ConfigError: there is no such module or object, or importing the module failed.

    Example:
        >>> load_object("math:pi", "number")
        3.141592653589793
    """
    seen = f"{field} is {text!r}"
    module_name, _, path = text.partition(":")
    words = [*module_name.split("."), *path.split(".")]
    if not all(word.isidentifier() for word in words) or module_name.endswith(".py"):
        raise ConfigError(
            f"{seen}; it must be module:object, as in my_module:MyClass for the MyClass of my_module.py (no folder, no "
            ".py)"
        )
    put_working_directory_on_path()
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{seen}, and there is no module {error.name!r} in {os.getcwd()} or among the installed packages: "
                f"start atesd in the folder that holds it, or correct the name"
            ) from error
        raise ConfigError(
            f"{seen}, and importing {module_name} failed: {type(error).__name__}: {one_line(error)}. Correct the "
            f'module; `python -c "import {module_name}"` shows where it failed'
        ) from error
    for word in path.split("."):
        if not hasattr(found, word):
            raise ConfigError(
                f"{seen}, and {getattr(found, '__file__', None) or module_name} has no {path!r}: correct the name"
                f"{suggest(word, dir(found))}"
            )
        found = getattr(found, word)
    return found


def put_working_directory_on_path() -> None:
    """Adds it to `sys.path`, as `python -m` does, and leaves it there: user code may import neighbours later."""
    importlib.invalidate_caches()  # the module may have been written a moment ago
    if os.getcwd() not in map(os.path.abspath, sys.path):  # "" is the working directory too
        sys.path.insert(0, os.getcwd())


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def load_divergence(text: str) -> Any:
    """The DivergenceTerm that `module:object` names. Its Triton twin is imported too, where there is Triton.

    Raises:
        ConfigError: it cannot be imported, is no DivergenceTerm, or has the name of another divergence.
    """
    term = load_object(text, "divergence")
    from atesd_kernels import DivergenceTerm  # here: it takes the seconds of torch

    if not isinstance(term, DivergenceTerm):
        raise ConfigError(
            f"divergence is {text!r}, of type {type(term).__name__}; it must be an atesd_kernels.DivergenceTerm"
        )
    if registry("divergence").get(term.name, term) is not term:
        raise ConfigError(
            f"divergence is {text!r}, whose name {term.name!r} another divergence has: give yours another name"
        )
    if term.triton is not None and find_spec("triton") is not None:
        load_object(term.triton, f"the Triton twin of divergence {text!r}")
    return term


def divergence_name(text: str) -> str:
    """The name by which the losses know the divergence: `text` itself, or the name of the term it loads and registers.

    Raises:
        ConfigError: see `load_divergence`.
    """
    if not is_object(text):
        return text
    from atesd_kernels import register_divergence

    return register_divergence(load_divergence(text)).name


def policy_factory(text: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable that `module:object` names, after its signature is compared with `kwargs`.

    Raises:
        ConfigError: it cannot be imported or called so, or is a class without the methods of an ExposurePolicy.
    """
    factory = load_object(text, "exposure_policy")
    if isinstance(factory, type):
        require_methods("exposure_policy", text, factory, POLICY_METHODS)
    check_kwargs("exposure_policy", text, factory, kwargs, "exposure_kwargs", POLICY_SETTINGS)
    unnamed = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    if unnamed:
        raise ConfigError(
            f"exposure_policy is {text!r}, which takes {', '.join(unnamed)} by position only: a run passes every "
            "argument by its name"
        )
    return factory


def engine_factory(text: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable that `module:object` names, after its signature is compared with `kwargs`.

    Raises:
        ConfigError: it cannot be imported or called so, or is a class without the methods of a RolloutEngine.
    """
    factory = load_object(text, "rollout_engine")
    if isinstance(factory, type):
        require_methods("rollout_engine", text, factory, ENGINE_METHODS)
    try:
        first = signature("rollout_engine", text, factory).bind_partial(*ENGINE_ARGUMENTS).arguments
    except TypeError as error:
        raise ConfigError(
            f"rollout_engine is {text!r}, which does not take {', '.join(ENGINE_ARGUMENTS)}, by position: {error}"
        ) from error
    check_kwargs("rollout_engine", text, factory, kwargs, "rollout_kwargs", tuple(first))
    return factory


def load_metrics(text: str | None) -> dict[str, Callable[[list[dict[str, Any]]], float]]:
    """The functions that `metrics` names, with commas between, by their names.

    Raises:
        ConfigError: one cannot be imported or called with the samples of a problem, or two have the same name.
    """
    found: dict[str, Callable[[list[dict[str, Any]]], float]] = {}
    for name in text.replace(" ", "").split(",") if text else ():
        metric = load_object(name, "metrics")
        try:
            signature("metrics", name, metric).bind([])
        except TypeError as error:
            raise ConfigError(
                f"metrics names {name!r}, which does not take the samples of a problem: {error}"
            ) from error
        label = getattr(metric, "__name__", name)
        if label in found:
            raise ConfigError(f"metrics names two functions {label!r}: rename one of them")
        found[label] = metric
    return found


def check_kwargs(
    field: str,
    text: str,
    factory: Callable[..., Any],
    kwargs: Mapping[str, Any],
    kwargs_field: str,
    passed: Collection[str],
) -> None:
    """Raises ConfigError unless `factory` accepts `kwargs` in addition to `passed`, the names the run passes."""
    refuse_passed(kwargs_field, kwargs, passed)
    parameters = signature(field, text, factory).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = [parameter.name for parameter in named if parameter.name not in passed]
    if not takes_any:
        refuse_unknown(field, text, kwargs, kwargs_field, own)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in (*passed, *kwargs):
            raise ConfigError(f"{field} {text!r} needs {parameter.name!r}: give it in {kwargs_field}")


def check_shipped_kwargs(field: str, name: str, kwargs: Mapping[str, Any], kwargs_field: str) -> None:
    """`check_kwargs` for a registered name. It checks names that atesd ships without importing them."""
    passed = POLICY_SETTINGS if field == "exposure_policy" else ENGINE_ARGUMENTS
    if name not in NAMES[field]:
        return check_kwargs(field, name, registry(field)[name], kwargs, kwargs_field, passed)
    own = POLICY_KWARGS.get(name, ()) if field == "exposure_policy" else ()
    refuse_passed(kwargs_field, kwargs, passed)
    refuse_unknown(field, name, kwargs, kwargs_field, own)
    for word, value in kwargs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{word} of {kwargs_field} is {value!r}; it must be between 0 and 1")


def refuse_unknown(field: str, text: str, kwargs: Mapping[str, Any], kwargs_field: str, own: Collection[str]) -> None:
    """Raises ConfigError for the first of `kwargs` that is not in `own`, the names that `text` takes."""
    for name in kwargs:
        if name not in own:
            takes = f"it takes {', '.join(own)}" if own else "it takes none"
            raise ConfigError(
                f"{kwargs_field} names {name!r}, which {field} {text!r} does not take: {takes}{suggest(name, own)}"
            )


def refuse_passed(kwargs_field: str, kwargs: Mapping[str, Any], passed: Collection[str]) -> None:
    for name in kwargs:
        if name in passed:
            flag = "per_example_exposure" if name == "per_example" else name
            advice = f"set --{flag} instead" if name in POLICY_SETTINGS else "leave it out"
            raise ConfigError(f"{kwargs_field} names {name!r}, which the run passes itself: {advice}")


def require_methods(field: str, text: str, made: Any, methods: Collection[str]) -> None:
    """Raises ConfigError for a policy or an engine, or a class of them, without one of `methods`."""
    missing = [name for name in methods if not callable(getattr(made, name, None))]
    if missing:
        raise ConfigError(f"{field} is {text!r}, which lacks {', '.join(missing)}: a run calls {', '.join(methods)}")


def signature(field: str, text: str, factory: Any) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{field} is {text!r}, of type {type(factory).__name__}; it must be a class or function that makes one: "
            f"{one_line(error)}"
        ) from error
