"""The examples users copy: those of the docstrings say what the code does, and the README's blocks run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("module", ("losses", "modules", "divergences", "exposure"))
def test_the_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(importlib.import_module(f"atesd_kernels.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_readme_has_examples():
    assert any("linear_divergence" in block for block in BLOCKS)


@pytest.mark.parametrize("block", [b for b in BLOCKS if "atesd_kernels" in b and "integrations" not in b])
def test_the_readme_s_python_blocks_run(block):
    names = {
        "student_hidden": torch.randn(6, 16, requires_grad=True),
        "teacher_hidden": torch.randn(6, 16),
        "lm_head_weight": torch.randn(50, 16),
    }
    exec(block, names)
    if "loss.backward()" in block:
        assert names["student_hidden"].grad.norm() > 0
