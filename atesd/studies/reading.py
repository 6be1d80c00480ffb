"""Reads a study from its YAML file of a dozen lines: one that ships, by its name, or one of yours, by its path.

`extends` names one study or several that this one builds on: its variants and their settings are added to theirs, and
every other key replaces theirs. `grid` crosses every variant with values of settings, as in

    grid: {learning_rate: [0.0005, 0.001]}

which makes `full-0.0005` and `full-0.001` of the variant `full`, and of the baseline that with the first value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from atesd.config.load import read_own, recipes
from atesd.errors import ConfigError, suggest
from atesd.studies.spec import Measure, StudySpec

__all__ = ["load_spec", "shipped"]

KEYS = [f.name for f in fields(StudySpec) if f.name != "name"] + ["extends", "grid"]
MERGED = ("settings", "variants", "published")


def shipped() -> dict[str, Path]:
    """The studies that ship with the package, by name."""
    folder = Path(str(resources.files("atesd"))) / "studies" / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_spec(name_or_path: str) -> StudySpec:
    """Reads a study.

    Raises:
        ConfigError: there is none, or it has an unknown key, a missing one, or values that cannot be used.
    """
    path = find(name_or_path)
    content = read(path)
    if missing := [key for key in ("variants", "baseline") if key not in content]:
        raise ConfigError(f"{path} has no {missing[0]}: a study needs variants and a baseline")
    try:
        crossed(content)
        values = {**content, "measure": Measure(**content.get("measure", {}))}
        values["seeds"] = tuple(int(seed) for seed in content.get("seeds", StudySpec.seeds))
        values["published"] = {str(name): dict(number) for name, number in content.get("published", {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    return StudySpec(name=path.stem, **values)


def find(name_or_path: str) -> Path:
    known = shipped()
    path = known.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ConfigError(
            f"there is no study {name_or_path!r}{suggest(name_or_path, known)}; those that ship are "
            f"{', '.join(known)}. For one of yours, give the path of its YAML file"
        )
    return path


def read(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the content of a file on top of the studies that it extends."""
    if path in inside:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(map(str, inside))}")
    own = read_own(path)
    for key in own:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r} in {path}{suggest(str(key), KEYS)}; it may have {', '.join(KEYS)}")
    recipe = own.get("recipe")
    if recipe and recipe not in recipes() and (path.parent / str(recipe)).is_file():
        own["recipe"] = str(path.parent / str(recipe))
    try:
        own["settings"] = dict(own.get("settings") or {})
        own["variants"] = {str(name): dict(settings or {}) for name, settings in (own.get("variants") or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    content: dict[str, Any] = {}
    bases = own.pop("extends", None) or []
    if not isinstance(bases, str | list):
        raise ConfigError(f"{path} cannot be used: extends is {bases!r}; name one study, or a list of them")
    for base in [bases] if isinstance(bases, str) else bases:
        beside = path.parent / str(base)
        add(content, read(beside if beside.is_file() else find(str(base)), (*inside, path)))
    add(content, own)
    if not content["variants"]:
        del content["variants"]
    return content


def add(content: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Puts a study on top of another: settings, variants and published numbers by name, all else as a whole."""
    variants = content.get("variants", {})
    merged = {name: {**variants.get(name, {}), **settings} for name, settings in more.get("variants", {}).items()}
    of_name = {key: {**content.get(key, {}), **(more.get(key) or {})} for key in MERGED}
    content.update({**more, **of_name, "variants": {**variants, **merged}})


def crossed(content: dict[str, Any]) -> None:
    """Replaces every variant by one for each combination of the grid's values."""
    grid: Mapping[str, Iterable[Any]] = content.pop("grid", None) or {}
    if not grid:
        return
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if not points:
        raise ConfigError(f"grid is {grid}: give at least one value for each setting")
    names = ["-".join(map(str, point.values())) for point in points]
    content["variants"] = {
        f"{variant}-{name}": {**settings, **point}
        for variant, settings in content["variants"].items()
        for name, point in zip(names, points, strict=True)
    }
    content["published"] = {}  # of variants that this grid does not have
    content["baseline"] = f"{content['baseline']}-{names[0]}"
