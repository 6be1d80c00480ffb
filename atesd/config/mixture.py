"""The setting `teacher_views`: the views that make the teacher's target, and their weights."""

from __future__ import annotations

from atesd.config.fields import Settings
from atesd.config.options import parse_json
from atesd.errors import ConfigError, suggest

STUDENT = "student"
VIEWS = ("exposed", "full", "answer_only", "none", STUDENT)
SUM_TOLERANCE = 1e-6


def check_views(config: Settings) -> None:
    """Raises ConfigError for views that cannot be mixed, or that leave other settings nothing to do."""
    views = parse_json(config.teacher_views)
    if unknown := [name for name in views if name not in VIEWS]:
        known = ", ".join(VIEWS)
        raise ConfigError(f"teacher_views has {unknown[0]!r}{suggest(unknown[0], VIEWS)}; the views are {known}")
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in views.values())
    if not views or not numbers or not abs(sum(views.values()) - 1) <= SUM_TOLERANCE:
        raise ConfigError(
            f"teacher_views is {config.teacher_views}: give each view a number, and let them sum to 1 (negative ones "
            'are allowed), such as {"exposed": 1.3, "answer_only": -0.3}'
        )
    if set(views) == {"student"}:
        raise ConfigError("teacher_views names the student alone, which teaches itself nothing: add another view")
    if set(views) != {"exposed"} and config.objective not in ("distill", "distill+grpo", "distill+sft"):
        raise ConfigError(
            f"objective is {config.objective!r}, and teacher_views {config.teacher_views} are mixed for a divergence "
            "only: set objective to 'distill', or leave teacher_views out"
        )
    if "exposed" not in views and config.exposure_policy != "full":
        raise ConfigError(
            f"teacher_views is {config.teacher_views}, without 'exposed', so exposure_policy "
            f"{config.exposure_policy!r} would choose an exposure that nothing reads: set exposure_policy to 'full'"
        )


def views_of(config: Settings) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns names and weights of `config.teacher_views`. The student's own view comes last."""
    weights = parse_json(config.teacher_views)
    names = tuple(sorted(weights, key=lambda name: name == STUDENT))
    return names, tuple(float(weights[name]) for name in names)


def teacher_forwards(config: Settings) -> int:
    """Returns how often the teacher reads a response: once for each view but the student's own. A server's does so
    elsewhere."""
    if config.teacher == "vllm_server":
        return 0
    return sum(name != STUDENT for name in views_of(config)[0])
