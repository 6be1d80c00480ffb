"""What a user meets before the first call: importing, versions, and the examples for contributors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n# (\w+)\.py\n(.*?)^```", re.MULTILINE | re.DOTALL)
USE_THEM = """
import torch
import my_divergence, my_policy, my_engine
from atesd.policies import make_policy
from atesd_kernels import linear_divergence

torch.manual_seed(0)
student, head, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8), torch.randn(3, 8)
results = []
for backend in ("torch", "triton"):
    loss = linear_divergence(student, head, teacher, divergence="squared", backend=backend)
    results.append((loss, *torch.autograd.grad(loss, student)))
p, q = (torch.softmax(h @ head.T, -1) for h in (teacher, student))
torch.testing.assert_close(results[0][0], ((p - q) ** 2).sum(-1).mean())
torch.testing.assert_close(results[0], results[1])
torch.testing.assert_close(results[0][1], torch.autograd.grad(((p - q) ** 2).sum(-1).mean(), student)[0])
policy = make_policy("alternating")
assert [policy.alpha(t) for t in range(3)] == [0.0, 1.0, 0.0]
assert [r.response_ids for r in my_engine.Parrot().generate([[1, 2], [3]])] == [[2], [3]]
"""


def run(code: str, *path: Path, **env: str) -> str:
    paths = os.pathsep.join(map(str, (*path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_losses_imports_nothing_beside_torch():
    code = "import sys, torch; before = set(sys.modules); import atesd_kernels; print(*(set(sys.modules) - before))"
    new = {name.partition(".")[0] for name in run(code).split()}
    assert "atesd_kernels" in new
    third_party = new - set(sys.stdlib_module_names) - {"atesd_kernels", "torch"}
    assert not third_party


def test_the_contributors_examples_are_short_and_run(tmp_path):
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert set(blocks) == {"my_divergence", "my_kernels", "my_policy", "my_engine"}
    for name, code in blocks.items():
        assert len(code.splitlines()) < 20, name
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    run(USE_THEM, tmp_path, TRITON_INTERPRET="1")


def test_one_version_everywhere():
    version = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert first == version
