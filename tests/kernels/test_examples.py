"""The examples users copy: those of the docstrings say what the code does, and the blocks of the pages run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "atesd_kernels/README.md"))
BLOCKS = list(dict.fromkeys(re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)))


@pytest.mark.parametrize("module", ("losses", "modules", "divergences", "exposure"))
def test_the_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(importlib.import_module(f"atesd_kernels.{module}"))
    assert result.attempted > 0 and result.failed == 0


INTEGRATIONS = [block for block in BLOCKS if "integrations" in block]  # run by tests/integrations
HERE = [block for block in BLOCKS if block not in INTEGRATIONS]


def test_the_pages_have_examples():
    fences = re.findall(r"^```(\w+)", TEXT, re.MULTILINE)
    assert fences.count("python") == len(HERE) + len(INTEGRATIONS), "every block of Python is found, and so is run"
    assert set(fences) <= {"python", "bash", "text"}
    assert any("linear_divergence" in block for block in HERE)


@pytest.mark.parametrize("block", HERE)
def test_the_pages_python_blocks_run(block):
    names = {
        "student_hidden": torch.randn(6, 16, requires_grad=True),
        "teacher_hidden": torch.randn(6, 16),
        "full_hidden": torch.randn(6, 16),
        "answer_only_hidden": torch.randn(6, 16),
        "lm_head_weight": torch.randn(50, 16),
        "ids": torch.arange(24).view(6, 4),  # a teacher's top 4
        "logprobs": torch.full((6, 4), 0.2).log(),
    }
    exec(block, names)
    if "loss.backward()" in block:
        assert names["student_hidden"].grad.norm() > 0
