"""What a user meets before the first call: importing, and versions."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import atesd

ROOT = Path(__file__).parent.parent


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


def test_importing_the_losses_takes_less_than_a_second_beyond_torch():
    # this process's time, not the wall's: the machine may be busy
    clock = "time.process_time()"
    code = f"import time, torch; start = {clock}; import atesd_kernels; print({clock} - start)"
    assert float(run(code)) < 1


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, the wheel built from it) of a copy of this checkout, with what this environment has."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "runs", "evals", "results")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

    def made(what: str, source: Path) -> Path:
        command = [sys.executable, "-c", build, what, str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    sdist = made("build_sdist", folder / "source")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, made("build_wheel", unpacked)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["sdist", "wheel"])
def test_an_installed_distribution_is_whole(built, which, tmp_path):
    package, target = built[which == "wheel"], tmp_path / "site"
    # dependencies are this environment's; the distribution itself goes where nothing else of it is
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(package)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = """
import sys, pkgutil, importlib, atesd, atesd_kernels
from importlib import metadata, resources
from atesd.config import load_config, recipes
for package in (atesd, atesd_kernels):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
    assert all(resources.files(package).joinpath(name).is_file() for name in ("py.typed", "README.md"))
(found,) = metadata.distributions(name="atesd", path=[sys.argv[1]])
assert found.version == atesd.__version__
assert len(recipes()) == int(sys.argv[2])
config = load_config("quickstart", [])
assert all(file.startswith(sys.argv[1]) for file in (config.dataset_name, config.prompt_templates)), config
from atesd_kernels import linear_divergence
import torch
assert linear_divergence(torch.randn(3, 4), torch.randn(9, 4), torch.randn(3, 4)) > 0
"""
    command = [sys.executable, "-c", code, str(target), str(len(list((ROOT / "atesd" / "recipes").glob("*.yaml"))))]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = {p.relative_to(ROOT) for name in ("atesd", "atesd_kernels") for p in (ROOT / name).rglob("*.py")}
    assert not [module for module in modules if not (target / module).is_file()]
    assert (target / "bin" / "atesd").is_file()


def test_the_sdist_holds_the_tests_and_what_they_read(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "tests/conftest.py"):
        assert name in names, name
    for name in ("requirements-vllm.txt", "requirements-sanitize.txt", "requirements-oldest.txt", "bench/table.py"):
        assert name in names, name


def all_requirements(built) -> list[Requirement]:
    """Of the package and all its extras, on this machine."""
    fields = metadata_of(built)
    extras = fields.get_all("Provides-Extra")
    return [
        requirement
        for requirement in map(Requirement, fields.get_all("Requires-Dist"))
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def metadata_of(built) -> email.message.Message:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_this_environment_satisfies_every_extra_it_has_packages_of(built):
    """Extras resolve together: one set of versions, those the tests run with, is within all their ranges at once."""
    fields = metadata_of(built)
    extras = fields.get_all("Provides-Extra")
    assert {"gpu", "trl", "vllm", "bench", "test"} <= set(extras)
    checked = set()
    for requirement in all_requirements(built):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} and {version}"
        checked.add(requirement.name)
    assert {"torch", "transformers", "trl", "liger-kernel", "math-verify", "pytest", "triton"} <= checked
    supported = {c.rpartition(" ")[2] for c in fields.get_all("Classifier") if "Python :: 3." in c}
    assert supported == {"3.10", "3.11", "3.12", "3.13"} and fields["Requires-Python"] == ">=3.10"


def test_the_oldest_python_reads_every_module():
    for path in (p for name in ("atesd", "atesd_kernels") for p in (ROOT / name).rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_the_ranges_of_all_extras_and_the_pins_have_a_version_in_common(built):
    """What can be known without an index: no package is asked for twice in ways that exclude each other."""
    asked = defaultdict(SpecifierSet)
    for requirement in all_requirements(built):
        asked[requirement.name] &= requirement.specifier
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name: r.specifier for line in lines if line and line[0] != "#" for r in [Requirement(line)]}
    assert set(pins) <= set(asked)
    for name, ranges in asked.items():
        both = ranges & pins.get(name, SpecifierSet())
        # a range that has versions has one of the bounds it is made of
        assert any(both.contains(bound.version) for bound in both), f"{name}: {both}"


def test_the_oldest_versions_allowed_are_those_that_make_test_oldest_runs_on(built):
    allowed = {requirement.name: requirement.specifier for requirement in all_requirements(built)}
    lines = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines()
    installed = [Requirement(line) for line in lines if line and line[0] != "#"]
    pins = {r.name: next(iter(r.specifier)).version for r in installed if str(r.specifier).startswith("==")}
    assert all(allowed[name].contains(pin) for name, pin in pins.items() if name in allowed), pins
    for name in ("torch", "triton", "transformers"):
        (oldest,) = (bound.version for bound in allowed[name] if bound.operator == ">=")
        assert Version(oldest) == Version(pins[name]), name
    for name in ("torch", "triton", "transformers"):
        mentioned = f"{name} {'.'.join(pins[name].split('.')[:2])}"
        assert mentioned in (ROOT / "atesd" / "README.md").read_text(encoding="utf-8"), mentioned


def test_one_version_everywhere():
    version = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert atesd.__version__ == version
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert first == version
