"""What CONTRIBUTING.md promises: its examples train through the command line, and wrong ones are refused by name."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from atesd import cli
from atesd.config import doors
from atesd.exposure.policies import make_policy
from atesd.rollout import make_engine
from atesd_kernels import DivergenceTerm, divergence, divergences, linear_divergence, linear_logprobs, planning

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^(atesd train (?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
EXTRA = """
from atesd_kernels import DivergenceTerm
from my_divergence import squared_distance

TAKEN = DivergenceTerm("forward_kl", squared_distance)
NO_TWIN = DivergenceTerm("no_twin", squared_distance, triton="my_kernel:squared_distance")
number = 3


class Silent:
    def alpha(self, step):
        return 1.0


def silent():
    return Silent()


def by_position(hold_window, /):
    return Silent()


def imports_later():
    import my_policy

    return my_policy.Alternating(hold_window=1)


def needs_size(config, model, tokenizer, processes, size):
    return None


def deaf():
    return None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds the examples; what a test imports and registers from it is forgotten."""
    modules = {**BLOCKS, "extra": EXTRA, "broken": "import json\n\njson.loads('[1,')\n"}
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(divergences, "_REGISTRY", dict(divergences._REGISTRY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def train(folder, tiny_config) -> Callable[..., int]:
    """`train("--flag", "value", ...)`: the exit code of `atesd train tiny.yaml` with these flags."""
    settings = {name: value for name, value in asdict(tiny_config()).items() if value is not None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return lambda *flags: cli.main(["train", "tiny.yaml", *flags])


@pytest.fixture
def refused(train, folder, capsys) -> Callable[..., str]:
    """`refused("--flag", "value", ...)`: what `atesd train` says. It must be one line and leave no run behind."""

    def message(*flags: str) -> str:
        assert train(*flags) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith("atesd: ")
        assert not (folder / "run").exists()
        return told

    return message


def test_the_examples_are_short():
    assert set(BLOCKS) == {"my_divergence", "my_kernels", "my_policy", "my_engine", "my_metrics", "my_backend"}
    for name, code in BLOCKS.items():
        assert len(code.splitlines()) < 20, name


def test_the_examples_train_by_the_command_beside_them_and_resume(train, folder, capsys):
    (command,) = (shlex.split(command.replace("\\\n", " ")) for command in COMMANDS)
    assert command[:3] == ["atesd", "train", "quickstart"]
    flags = command[3:]
    assert train(*flags, "--max_steps", "2") == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["alpha"] for line in steps] == [1.0, 0.25]
    assert [line["response_length"] for line in steps] == [2.0, 2.0]
    assert all(0 < line["mismatch"] < 2 for line in steps), "a squared distance is below 2"
    saved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert saved["divergence"] == "my_divergence:TERM" and saved["rollout_kwargs"] == '{"repeats": 2}'

    resume = ["train", "--resume", str(folder / "run"), "--max_steps", "3"]
    capsys.readouterr()
    for other in (["--exposure_kwargs", '{"low": 0.5}'], ["--rollout_engine", "hf"], ["--divergence", "jsd"]):
        assert cli.main([*resume, *other]) == 2
        assert "was started with" in capsys.readouterr().err
    assert cli.main([*resume, "--exposure_kwargs", '{"low":0.25}']) == 0, "spaces in JSON do not make another run"
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["alpha"]) == (3, 1.0)


def test_the_engine_writes_the_answers_of_an_evaluation(folder, tiny_model_path):
    (folder / "data.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n', encoding="utf-8")
    flags = ["--model", str(tiny_model_path), "--data", "data.jsonl", "--k", "2", "--max_new_tokens", "8"]
    flags += ["--output_dir", "evaluation", "--rollout_engine", "my_engine:Parrot"]
    assert cli.main(["eval", *flags, "--rollout_kwargs", '{"repeats": 3}']) == 0
    lines = (folder / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["num_tokens"] for line in lines] == [3, 3]


def test_the_metric_is_reported_with_an_interval_and_for_a_finished_evaluation_too(folder, tiny_model_path, capsys):
    rows = [{"problem": f"What is 1 + {n}?", "answer": str(n + 1)} for n in range(2)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["eval", "--model", str(tiny_model_path), "--data", "data.jsonl", "--k", "2", "--max_new_tokens", "8"]
    flags += ["--output_dir", "evaluation", "--rollout_engine", "my_engine:Parrot"]
    assert cli.main(flags) == 0
    samples = (folder / "evaluation" / "samples.jsonl").read_bytes()
    assert cli.main([*flags, "--metrics", "my_metrics:says_therefore"]) == 0
    results = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["says_therefore"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (folder / "evaluation" / "samples.jsonl").read_bytes() == samples
    for wrong, message in (("my_metrics:nothing", "has no 'nothing'"), ("extra:silent", "does not take the samples")):
        capsys.readouterr()
        assert cli.main([*flags, "--metrics", wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_triton_twin_computes_what_the_torch_term_does(folder):
    term = doors.load_divergence("my_divergence:TERM")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, head, teacher = (torch.randn(*shape, device=device) for shape in ((3, 8), (20, 8), (3, 8)))
    hidden.requires_grad_()
    results = []
    for backend in ("torch", "triton"):
        loss = linear_divergence(hidden, head, teacher, divergence=term, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    p, q = (torch.softmax(h @ head.T, -1) for h in (teacher, hidden))
    by_hand = ((p - q) ** 2).sum(-1).mean()
    torch.testing.assert_close(results[0], (by_hand, *torch.autograd.grad(by_hand, hidden)))
    torch.testing.assert_close(results[1], results[0])


def test_the_backend_computes_what_the_torch_backend_does(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    called, backend = [], planning.own_backend("my_backend:Dense")
    formulas = backend.divergence_logits
    monkeypatch.setattr(backend, "divergence_logits", lambda *given: (called.append(1), formulas(*given))[1])
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    for options in ({}, dict(divergence="jsd", temperature=1.3, reduction="none"), dict(mask=mask, entry_clip=0.1)):
        results = []
        for name in ("torch", "my_backend:Dense"):
            logits = student.clone().requires_grad_()
            loss = divergence(logits, teacher, backend=name, **options)
            results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
        torch.testing.assert_close(results[1], results[0])
    assert len(called) == 3
    hidden, head, targets = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, 2, 3])
    logprobs = [linear_logprobs(hidden, head, targets, backend=name) for name in ("torch", "my_backend:Dense")]
    torch.testing.assert_close(*logprobs)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--divergence my_divergance:TERM", "there is no module 'my_divergance' in "),
        ("--divergence my_divergence.py:TERM", "no folder, no .py"),
        ("--divergence ./my_divergence:TERM", "must be module:object, as in"),
        ("--divergence my_divergence:TERN", "my_divergence.py has no 'TERN': correct the name .did you mean TERM"),
        ("--divergence broken:TERM", "importing broken failed: JSONDecodeError: Expecting value"),
        ("--divergence my_divergence:squared_distance", "of type function; it must be an atesd_kernels.DivergenceTerm"),
        ("--divergence extra:TAKEN", "whose name 'forward_kl' another divergence has"),
        ("--divergence extra:NO_TWIN", "the Triton twin of divergence 'extra:NO_TWIN' is 'my_kernel:squared_dist"),
        ("--divergence foward_kl", "or module:object, your own .did you mean forward_kl"),
        ("--exposure_policy ful", "one of atesd, .* or module:object, your own .did you mean full"),
        ("--exposure_policy my_policy:Alternatin", "did you mean Alternating"),
        ("--exposure_policy extra:number", "is 'extra:number', of type int; it must be a class or function"),
        ("--exposure_policy extra:Silent", "lacks alphas, observe, finish, state_dict, load_state_dict: a run calls"),
        ('--exposure_kwargs {"low":1}', "names 'low', which exposure_policy 'atesd' does not take: it takes none"),
        ("--exposure_kwargs [1]", "exposure_kwargs is '\\[1\\]'; it must be a JSON object"),
        ("--exposure_policy extra:by_position", "which takes hold_window by position only: a run passes every arg"),
        ("--exposure_policy extra:number.size", "has no 'number.size': correct the name"),
        ("--rollout_engine sglang", "rollout_engine is 'sglang'; it must be one of hf, vllm, vllm_server, or module"),
        ("--rollout_engine extra:needs_size", "'extra:needs_size' needs 'size': give it in rollout_kwargs"),
        ("--rollout_engine extra:deaf", "does not take config, model, tokenizer, processes, by position"),
        ('--rollout_kwargs {"a":1}', "names 'a', which rollout_engine 'hf' does not take"),
        ("--rollout_kwargs 3", "rollout_kwargs is '3'; it must be a JSON object"),
    ],
)
def test_what_cannot_be_imported_or_called_is_refused_before_anything_is_loaded(refused, flags, told):
    assert re.search(told, refused(*flags.split(" ")))


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"lo": 0.2}, "names 'lo', which exposure_policy 'my_policy:Alternating' does not take: it takes low (did you"),
        ({"hold_window": 2}, "names 'hold_window', which the run passes itself: set --hold_window instead"),
        ({"per_example": True}, "which the run passes itself: set --per_example_exposure instead"),
    ],
)
def test_an_argument_that_a_policy_does_not_take_or_the_run_passes_is_refused(refused, kwargs, told):
    flags = ["--exposure_policy", "my_policy:Alternating", "--exposure_kwargs", json.dumps(kwargs)]
    assert told in refused(*flags)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"repeat": 2}, "names 'repeat', which rollout_engine 'my_engine:Parrot' does not take: it takes repeats (did"),
        ({"model": 2}, "rollout_kwargs names 'model', which the run passes itself: leave it out"),
    ],
)
def test_an_argument_that_an_engine_does_not_take_or_the_run_passes_is_refused(refused, kwargs, told):
    assert told in refused("--rollout_engine", "my_engine:Parrot", "--rollout_kwargs", json.dumps(kwargs))


def test_code_of_the_working_directory_may_import_its_neighbours_when_it_is_called(folder):
    assert str(folder) not in sys.path
    assert make_policy("extra:imports_later").alpha(1) == 0.0
    assert sys.path.count(str(folder)) == 1


def test_an_unknown_engine_is_no_longer_hf(tiny_config):
    with pytest.raises(ValueError, match="rollout_engine is 'sglang'; it must be one of hf"):
        make_engine(tiny_config(rollout_engine="sglang"), None, None)


def test_a_name_registered_in_this_process_is_a_name(folder, tiny_config):
    config = tiny_config(divergence="registered_here")
    with pytest.raises(ValueError, match="divergence is 'registered_here'"):
        config.validate()
    divergences.register_divergence(DivergenceTerm("registered_here", lambda log_p, log_q, beta: (log_p, log_q)))
    config.validate()
