"""Stage 2: is it right? The kernels' GPU suite, the losses' tests on CUDA, and what only a GPU can show.

The sanitizer and the tests run beside one another; the large logits come first, while the memory is free.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import torch

import atesd_kernels
from atesd_kernels import reference
from bench import entrants
from bench.gpu.clock import first_line
from bench.gpu.stage import Stage
from bench.machine import ROOT

# one call of pytest, whose workers start once; a table names the groups
TESTS = {
    "kernels": (
        "tests/kernels/test_triton_gpu.py",
        "tests/kernels/test_contract.py",
        "tests/kernels/test_triton_terms.py",
        "tests/kernels/test_autograd.py",
        "tests/kernels/test_peers.py",
    ),
    "loop": ("tests/models/test_varlen_gpu.py", "tests/test_waits_gpu.py"),
    "top k, views, softcap": (
        "tests/kernels/test_topk.py",
        "tests/kernels/test_views.py",
        "tests/kernels/test_softcap.py",
    ),
    "exactness": ("tests/kernels/test_exactness.py",),
}
DRY_TESTS = {"planning": ("tests/kernels/test_planning.py",)}
MOST_FAILURES = 60  # of a group, named in the result
OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR) (tests/.+)")  # a test's name may hold spaces


def run(stage: Stage) -> None:
    sanitizer = start_sanitizer(stage)
    large = [large_logits] if not stage.dry else []
    checks = {check.__name__: check for check in (*large, compiled_step, graph_of_a_micro_batch)}
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check(stage)
        except Exception as error:  # a check that crashes has failed, and the others run
            found[name] = {"passed": False, "why": first_line(error)}
        stage.keep(checks=found)
        stage.say(f"{name}: {found[name]}")
    stage.keep(tests=run_tests(stage, DRY_TESTS if stage.dry else TESTS))
    if sanitizer is not None:
        finish_sanitizer(stage, *sanitizer)


def run_tests(stage: Stage, groups: dict[str, tuple[str, ...]]) -> dict[str, dict]:
    """Counts of each group, and what failed. A run that the time limit ends counts what it got to."""
    workers = 1 if stage.dry else max(2, (os.cpu_count() or 2) - 2)
    folder = Path(tempfile.mkdtemp())
    log, report = folder / "log.txt", folder / "report.xml"
    paths = [path for group in groups.values() for path in group]
    command = [sys.executable, "-m", "pytest", *paths, "-v", "-n", str(workers), "--dist", "worksteal", "--tb=line"]
    command += ["-p", "no:cacheprovider", "--no-header", f"--junitxml={report}", "-W", "ignore"]
    limit = max(10.0, stage.left - 6)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    stage.say("the tests ended" if ended else f"the tests were cut short after {limit:.0f} s")
    output, why = log.read_text(errors="replace"), failures(report)
    found = {name: {"ended": ended, **counts(output, paths, why)} for name, paths in groups.items()}
    for name, tests in found.items():
        stage.say(f"{name}: {outcome(tests)}")
        for test, reason in tests["failures"].items():
            stage.say(f"FAILED {test}: {reason[:250]!r}")
    if not any(tests["passed"] for tests in found.values()):
        stage.say(output[-1500:])
    return found


def failures(report: Path) -> dict[str, str]:
    """Test -> its message. Nothing if the report was never written."""
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": (problem.get("message") or "")[:400]
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    }


def counts(output: str, paths: tuple[str, ...], why: dict[str, str]) -> dict:
    """From the lines of `pytest -v`: outcomes of the tests in `paths`."""
    lines = output.partition("= short test summary")[0]
    found = [(kind, test.strip()) for kind, test in OUTCOME.findall(lines) if test.partition("::")[0] in paths]
    outcomes = Counter(kind for kind, _ in found)
    failed = [test for kind, test in found if kind in ("FAILED", "ERROR")]
    return {
        "passed": outcomes["PASSED"],
        "failed": outcomes["FAILED"] + outcomes["ERROR"],
        "skipped": outcomes["SKIPPED"],
        "failures": {test: why.get(test, "") for test in failed[:MOST_FAILURES]},
    }


def outcome(tests: dict) -> str:
    return ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def large_logits(stage: Stage) -> dict:
    """16,384 x 151,936 logits: places beyond 2^31, in the caller's logits and in a chunk of our own."""
    n, v, h = 16_384, 151_936, 64
    generator = torch.Generator("cuda").manual_seed(0)
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    s = torch.randn(n, v, device="cuda", dtype=torch.bfloat16, generator=generator)
    t = (s.float() + 0.1 * torch.randn(n, v, device="cuda", generator=generator)).bfloat16()
    leaf = s.requires_grad_()
    values = atesd_kernels.divergence(leaf, t, reduction="none", backend="triton")
    values.sum().backward()
    s64, t64 = s[some].detach().double().requires_grad_(), t[some].double()
    expected = reference.token_divergence(s64, t64)
    expected.sum().backward()
    errors = {
        "given logits, loss": entrants.relative_error(values[some].detach(), expected.detach()),
        "given logits, gradient": entrants.relative_error(leaf.grad[some], s64.grad),
    }
    del s, t, leaf, values
    hidden = torch.randn(n, h, device="cuda", generator=generator).bfloat16()
    teacher = (hidden.float() + 0.05 * torch.randn(n, h, device="cuda", generator=generator)).bfloat16()
    weight = (0.3 * torch.randn(v, h, device="cuda", generator=generator)).bfloat16()
    leaf = hidden.clone().requires_grad_()
    atesd_kernels.linear_divergence(
        leaf, weight, teacher, reduction="sum", backend="triton", chunk_bytes=6 * n * v + (1 << 20)
    ).backward()
    truth = hidden[some].double().requires_grad_()
    reference.linear_divergence(truth, weight.double(), teacher[some].double(), reduction="sum").backward()
    errors["one chunk, gradient"] = entrants.relative_error(leaf.grad[some], truth.grad)
    return {"passed": all(error < 5e-3 for error in errors.values()), "errors": errors}


class TinyStep:
    """A layer and the loss on top, as a trainer's step has them."""

    def __init__(self, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator).bfloat16()

        self.layer = torch.nn.Linear(64, 64, device=device, dtype=torch.bfloat16)
        self.weight, self.x, self.teacher = 0.3 * normal(1009, 64), normal(96, 64), normal(96, 64)
        self.mask = torch.arange(96, device=device) % 3 > 0

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return atesd_kernels.linear_divergence(self.layer(x), self.weight, self.teacher, mask=self.mask, num_tokens=64)

    def step(self) -> torch.Tensor:
        loss = self.loss(self.x)
        loss.backward()
        return loss.detach()


def compiled_step(stage: Stage) -> dict:
    """`torch.compile(fullgraph=True)` over a layer with the loss inside: same loss, same gradient."""
    tiny = TinyStep(stage.device)
    eager, gradient = tiny.step(), tiny.layer.weight.grad.clone()
    tiny.layer.weight.grad = None
    loss = torch.compile(tiny.loss, fullgraph=True)(tiny.x)
    loss.backward()
    errors = {
        "loss": entrants.relative_error(loss.detach(), eager.double()),
        "gradient": entrants.relative_error(tiny.layer.weight.grad, gradient.double()),
    }
    return {"passed": all(error < 1e-2 for error in errors.values()), "errors": errors}


def graph_of_a_micro_batch(stage: Stage) -> dict:
    """A CUDA graph around forward, loss and backward of a micro-batch replays what the calls gave."""
    tiny = TinyStep(stage.device)
    eager, gradient = tiny.step(), tiny.layer.weight.grad.clone()
    if stage.dry:
        return {"passed": None, "why": "needs a GPU"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tiny.step()
    torch.cuda.current_stream().wait_stream(side)
    tiny.layer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = tiny.step()
    tiny.layer.zero_grad(set_to_none=False)
    graph.replay()
    same = torch.equal(loss, eager) and torch.equal(tiny.layer.weight.grad, gradient)
    return {"passed": same, "loss": [float(eager), float(loss)]}


def start_sanitizer(stage: Stage) -> tuple[subprocess.Popen, Path] | None:
    """`compute-sanitizer` over three small cases of the GPU suite, while the tests run."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if stage.dry or not Path(tool).exists():
        stage.leave_out("compute-sanitizer", "it is not there")
        return None
    cases = "test_bias_softcap_temperatures_mask_and_weights or test_both_clips or test_log_probabilities"
    log = Path(tempfile.mkdtemp()) / "sanitizer.txt"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "60"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["tests/kernels/test_triton_gpu.py", "-k", f"({cases}) and (float32 or clips or bias)"]
    with log.open("w") as file:
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment), log


def finish_sanitizer(stage: Stage, process: subprocess.Popen, log: Path) -> None:
    try:
        status = process.wait(max(1.0, stage.left - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        stage.leave_out("compute-sanitizer", "it did not end in time")
        stage.say(f"sanitizer, unfinished: {log.read_text(errors='replace')[-600:]}")
        return
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    stage.keep(sanitizer={"passed": status == 0, "status": status, "tail": lines[-6:]})
    stage.say(f"sanitizer: status {status}: {lines[-3:]}")


def table(result: dict) -> str:
    lines = []
    for name, found in result.get("checks", {}).items():
        errors = ", ".join(f"{what} {100 * error:.2g} %" for what, error in found.get("errors", {}).items())
        verdict = {True: "passed", False: "FAILED", None: "not run"}[found["passed"]]
        lines.append(f"- {name.replace('_', ' ')}: {verdict} {errors or found.get('why', '')}".rstrip())
    for name, tests in result.get("tests", {}).items():
        cut = "" if tests["ended"] else " (stopped by its time limit)"
        lines.append(f"- tests, {name}: {outcome(tests)}{cut}")
        lines += [f"  - {test}: {why[:120]}" for test, why in list(tests["failures"].items())[:8]]
    if "sanitizer" in result:
        lines.append(f"- compute-sanitizer: {'no fault' if result['sanitizer']['passed'] else 'FAILED'}")
    return "\n".join(lines)
