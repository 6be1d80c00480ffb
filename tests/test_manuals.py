"""The front page and the manuals: short, with links that lead somewhere, and a table of every metric a run writes."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from atesd.trainer import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / n for n in ("README.md", "atesd_kernels/README.md", "atesd/README.md", "bench/README.md")]
PAGES += [ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fields_of_the_manual() -> set[str]:
    section = (ROOT / "atesd" / "README.md").read_text(encoding="utf-8").split("## metrics.jsonl")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 12_288


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_description_on_a_package_index_has_no_link_into_the_repository(monkeypatch):
    declared = {}
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", declared.update)
    runpy.run_path(str(ROOT / "setup.py"))
    text = declared["long_description"]
    assert not [path for path, anchor in LINK.findall(text) if path], "a path leads nowhere there"
    assert "arxiv.org/abs/2605.11458" in text and "atesd_kernels/README.md" in text and "![" not in text


@pytest.mark.parametrize("settings", [
    {"eval_steps": 1, "num_eval_problems": 2, "eval_k": 2},
    {"objective": "distill+grpo", "num_generations": 2, "entry_clip": 0.05},
    {"token_clip": 0.5, "entry_clip": None, "per_example_exposure": True},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_every_field_a_run_writes_is_in_the_manual(tiny_config, settings):
    run_dir = train(tiny_config(max_steps=4, **settings))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    written = {name for row in rows for name in row}
    assert written - fields_of_the_manual() == set()
    assert "policy_loss" in written


def test_every_field_of_the_manual_is_one_the_code_writes():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "atesd").rglob("*.py"))
    for name in fields_of_the_manual():
        known = name.removeprefix("seconds_").removeprefix("eval_")
        assert re.search(rf"\b({name}|{known})\b", code), name
