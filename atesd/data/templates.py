r"""Templates of the student's and teacher's prompts, which a user can replace.

``prompts.py`` turns them into token ids. The structure follows OPSD (arXiv 2601.18734): the student reads the problem;
the teacher reads the problem, the reference and a transition that asks it to solve the problem itself. The wording, and
the templates for a partly or fully hidden reference, are our choice.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from atesd.errors import DataError

__all__ = ["PromptTemplates"]

SLOT = re.compile(r"\{(problem|reference|answer|transition)\}")
_TRANSITION = (
    "Read this until it is clear to you, but do not copy it. Now solve the problem yourself, in your own words: "
    "reason step by step, and put your final answer within \\boxed{}."
)
# (required slots, forbidden slots) of each template. All other slots are optional.
_RULES = {
    "student": ({"problem"}, {"reference", "transition"}),
    "teacher": ({"problem", "reference"}, set()),
    "teacher_partial": ({"problem", "reference", "answer"}, set()),
    "teacher_parts": ({"problem", "reference", "answer"}, set()),
    "teacher_answer_only": ({"problem", "answer"}, {"reference"}),
    # inserted verbatim, so slots are not filled ({answer} is allowed: \boxed{answer} is LaTeX)
    "transition": (set(), {"problem", "reference", "transition"}),
    "system": (set(), {"problem", "reference", "transition"}),
}


@dataclass(frozen=True)
class PromptTemplates:
    r"""Templates with slots ``{problem}``, ``{reference}``, ``{answer}`` and ``{transition}``. Other braces are text.

    ``student``             the problem only.
    ``teacher``             alpha = 1: the full solution. This is OPSD's prompt.
    ``teacher_partial``     in between: the first floor(alpha*m) segments (at least one) and the final answer.
    ``teacher_parts``       the same for segments that are not the leading ones (``exposure_order``), or that the data
                            give (``segments_column``).
    ``teacher_answer_only`` floor(alpha*m) = 0: the final answer only; does not mention a reference solution.
    ``transition``          the instruction to the teacher, the same at every alpha.
    ``system``              a system message for both, or ``None`` for the chat template's default. A problem whose
                            chat has a system turn keeps its own.

    >>> PromptTemplates(system="You are a careful mathematician.").system
    'You are a careful mathematician.'

    Raises ValueError if a template lacks a required slot or contains a forbidden one.
    """

    student: str = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."
    teacher: str = "{problem}\n\nHere is a reference solution to this problem:\n\n{reference}\n\n{transition}"
    transition: str = _TRANSITION
    system: str | None = None
    teacher_partial: str = (
        "{problem}\n\nHere is the beginning of a reference solution to this problem:\n\n{reference}\n\n"
        "Its final answer is: {answer}\n\n{transition}"
    )
    teacher_parts: str = (
        "{problem}\n\nHere are parts of a reference solution to this problem:\n\n{reference}\n\n"
        "Its final answer is: {answer}\n\n{transition}"
    )
    teacher_answer_only: str = "{problem}\n\nThe final answer to this problem is: {answer}\n\n{transition}"

    def __post_init__(self) -> None:
        for name, (needed, forbidden) in _RULES.items():
            slots = set(SLOT.findall(getattr(self, name) or ""))
            if missing := sorted(needed - slots):
                raise DataError(f"prompt template {name!r} lacks {{{missing[0]}}}: {getattr(self, name)!r}")
            if shown := sorted(forbidden & slots):
                raise DataError(f"prompt template {name!r} must not contain {{{shown[0]}}}: {getattr(self, name)!r}")

    @classmethod
    def from_file(cls, path: str | Path) -> PromptTemplates:
        """Reads templates from a YAML or JSON file with any of the fields. Missing fields keep their defaults."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"prompt_templates: no such file: {path}")
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"prompt_templates: {path} cannot be read: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or (unknown := sorted(set(map(str, content)) - set(known))):
            seen = unknown if isinstance(content, dict) else type(content).__name__
            raise DataError(f"prompt_templates: {path} must map some of {known} to strings, got {seen}")
        for name, value in content.items():
            if not isinstance(value, str) and not (name == "system" and value is None):
                raise DataError(f"prompt_templates: {name!r} in {path} must be a string, got {value!r}")
        return cls(**content)


def fill(template: str, **values: str) -> str:
    r"""Fills the slots in one pass. LaTeX braces, and slot names inside inserted values, stay unchanged.

    >>> fill("{problem} in \\boxed{}", problem="Simplify {answer}")
    'Simplify {answer} in \\boxed{}'
    """
    return SLOT.sub(lambda slot: values.get(slot[1], slot[0]), template)
