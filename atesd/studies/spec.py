"""What a study is: a grid of variants and seeds over a recipe. `reading.py` reads it from its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from atesd.config.load import ATESDConfig, as_flags, load_config
from atesd.errors import ConfigError, suggest

__all__ = ["OWN", "Measure", "StudySpec"]

# What the grid decides itself.
OWN = ("seed", "output_dir", "resume", "num_eval_problems", "eval_steps", "push_to_hub", "dry_run")


@dataclass(frozen=True)
class Measure:
    """How every run is measured before and after training: `k` samples of each of `problems` held-out problems."""

    problems: int = 64
    k: int = 4
    temperature: float = 1.0


@dataclass(frozen=True)
class StudySpec:
    """A study.

    Attributes:
        name: of the study.
        about: one line for `atesd study`.
        recipe: recipe or YAML file that all runs share; None: the defaults.
        settings: settings of all runs.
        variants: settings of each variant, on top of these.
        baseline: the variant that others are compared with.
        seeds: a run of every variant for each.
        measure: how they are measured.
        published: {variant: {"value": number, "source": where it stands}}, shown beside the results.
    """

    name: str
    variants: Mapping[str, Mapping[str, Any]]
    baseline: str
    recipe: str | None = None
    about: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    measure: Measure = Measure()
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"study {self.name!r}"
        if not self.variants or not self.seeds:
            raise ConfigError(f"{where} needs at least a variant and a seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"{where} names a seed twice: {', '.join(map(str, self.seeds))}")
        if self.baseline not in self.variants:
            raise ConfigError(f"the baseline of {where} is {self.baseline!r}; its variants: {', '.join(self.variants)}")
        for name in self.variants:
            if not name or any(c in name for c in "/\\\0") or name in (".", ".."):
                raise ConfigError(f"variant {name!r} of {where} names a folder: use letters, digits, '-' and '.'")
        known = [f.name for f in fields(ATESDConfig)]
        for name, settings in {"settings": self.settings, **self.variants}.items():
            for key, value in settings.items():
                if key not in known:
                    raise ConfigError(f"unknown setting {key!r} in {name} of {where}{suggest(str(key), known)}")
                if key in OWN:
                    raise ConfigError(f"{key} in {name} of {where} is the study's own to set: leave it out")
                if value is None:
                    raise ConfigError(f"{key} is null in {name} of {where}: give a value (0 switches a clip off)")
        for name in self.published:
            if name not in self.variants:
                raise ConfigError(f"{where} has a published number for {name!r}, which is no variant of it")
        for key, low in (("problems", 2), ("k", 1), ("temperature", 0.0)):
            if not getattr(self.measure, key) >= low:
                raise ConfigError(f"{key} in measure of {where} is {getattr(self.measure, key)}: at least {low}")

    def only(self, variants: list[str] | None, seeds: list[int] | None) -> StudySpec:
        """Returns the part of the study with these variants, its baseline among them, and these seeds."""
        for name in variants or ():
            if name not in self.variants:
                raise ConfigError(f"study {self.name!r} has no variant {name!r}{suggest(name, self.variants)}")
        kept = {n: s for n, s in self.variants.items() if not variants or n in variants or n == self.baseline}
        published = {name: number for name, number in self.published.items() if name in kept}
        return replace(self, variants=kept, published=published, seeds=tuple(seeds or self.seeds))

    def config(self, variant: str, seed: int, output_dir: Path, flags: list[str]) -> ATESDConfig:
        """Returns the settings of one run: the recipe's, the study's, `flags`, and the variant's, which win."""
        own = {"seed": seed, "num_eval_problems": self.measure.problems, "output_dir": str(output_dir)}
        return load_config(
            self.recipe, [*as_flags(self.settings), *flags, *as_flags({**self.variants[variant], **own})]
        )
