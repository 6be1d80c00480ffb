"""The rooms of `atesd`: a file imports only from rooms below its own, and never in a circle.

Imports are read with `ast`. Those inside functions and those for type checkers count too.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top. The rooms of one line do not import one another.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("studies",),
    ("trainer",),
    ("gradients",),
    ("run",),
    ("run_parts",),
    ("integrations", "merge"),
    ("guards", "inputs", "resuming"),
    ("step_metrics", "teacher_views", "served_teacher"),
    ("evaluation",),
    ("exposure", "rollout"),
    ("objectives", "planning"),
    ("data", "models", "reports"),
    ("config",),
    ("parallel", "storage"),
    ("hub",),
    ("files", "packages", "stopping"),
    ("errors", "terminal", "__init__"),
)
HEIGHT = {room: -level for level, rooms in enumerate(ROOMS) for room in rooms}
FEW_ENOUGH = 16  # a room with more files answers more than one question


@cache
def modules() -> dict[str, Path]:
    """Every module of `atesd` by its dotted name."""
    paths = {path: path.relative_to(ROOT).with_suffix("") for path in (ROOT / "atesd").rglob("*.py")}
    return {".".join(p.parent.parts if p.name == "__init__" else p.parts): path for path, p in paths.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str) -> set[str]:
    """The modules of `atesd` that `module` names in import statements."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {
                f"{node.module}.{name.name}" if f"{node.module}.{name.name}" in modules() else node.module
                for name in node.names
            }
    return found & set(modules())


def test_every_module_is_in_a_room_that_has_a_height():
    assert {room(module) for module in modules()} <= set(HEIGHT)


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_file_imports_only_from_rooms_below(module):
    here = room(module)
    upwards = {other for other in imported(module) if room(other) != here and HEIGHT[room(other)] >= HEIGHT[here]}
    assert not upwards, f"{module} imports {sorted(upwards)}, which lie in rooms beside or above its own"


def test_the_trainer_is_read_in_one_go():
    assert len(modules()["atesd.trainer"].read_text(encoding="utf-8").splitlines()) < 250


def test_no_circle_of_files():

    arrows = {module: imported(module) for module in modules()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_the_losses_know_nothing_of_the_loop():
    for path in (ROOT / "atesd_kernels").rglob("*.py"):
        names = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
        assert not [n.module for n in names if (n.module or "").split(".")[0] in ("atesd", "bench")], path


def test_a_room_has_few_files():
    for folder in {path.parent for path in modules().values()} - {ROOT / "atesd"}:
        assert len(list(folder.glob("*.py"))) - (folder / "__init__.py").exists() <= FEW_ENOUGH, folder
