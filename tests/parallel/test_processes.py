"""Several processes train as one with the same batch would: same rollouts, same decisions, same metrics to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib import resources
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.errors import AtesdError
from atesd.evaluation.reward import VerifierReward
from atesd.parallel.sharding import ShardingError, sharded_modules, zero3_parameters
from atesd.rollout import RolloutError
from atesd.rollout.seeds import seed_of
from atesd.run import Run
from atesd.trainer import Trainer, train
from atesd_kernels.integrations import sharded_head
from tests.run_logs import steady_rows_of

pytestmark = pytest.mark.usefixtures("no_report")

DIFFERENCES = ("reward", "advantage", "policy_loss")  # made of two steps' probe losses: small beside their rounding
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}
ZERO3 = ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-deepspeed")
ENGINES = [
    pytest.param(FSDP2, id="FSDP2"),
    pytest.param(ZERO2, id="ZeRO-2", marks=needs_deepspeed),
    pytest.param(ZERO3, id="ZeRO-3", marks=needs_deepspeed),
]


def assert_same(got: Path, expected: Path, rounding: float = 1e-5) -> None:
    """Metrics to rounding, samples to the letter."""
    for ours, theirs in zip(steady_rows_of(got), steady_rows_of(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            small = name.startswith(DIFFERENCES)
            bound = {"rel": 1e-3, "abs": 1e-6} if small else {"rel": rounding, "abs": 1e-9}
            assert ours[name] == pytest.approx(value, **bound), (theirs["step"], name)
    samples = [(run / "samples.jsonl").read_text().splitlines() for run in (got, expected)]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in samples), strict=True):
        assert ours.pop("alpha") == pytest.approx(theirs.pop("alpha")) and ours == theirs


@pytest.fixture(autouse=True, scope="module")
def deepspeed_loaded():
    """Once here, where it can be, and not once more by each forked process."""
    if find_spec("deepspeed") is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401


@pytest.fixture
def settings(tiny_config, tmp_path):
    def make(name: str, processes: int, **changes):
        """A step of eight problems, whoever shares it; the student wanders."""
        common = {
            "per_device_train_batch_size": 2, "num_probe_problems": 3, "temperature": 2.0, "top_p": 1.0, "top_k": 0,
            "learning_rate": 0.01, "max_grad_norm": 1e6, "entry_clip": None,
        }  # fmt: skip
        whose = {"gradient_accumulation_steps": 4 // processes, "output_dir": str(tmp_path / name)}
        return tiny_config(**{**common, **whose, **changes})

    return make


def stopped_after(config, steps: int) -> None:
    """Train, and be gone before step `steps`, counted from 0."""
    step = Trainer.train_step

    def train_step(self, t):
        if t == steps:
            raise KeyboardInterrupt
        return step(self, t)

    Trainer.train_step = train_step
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
    finally:
        Trainer.train_step = step


@pytest.mark.parametrize("changes", [
    {"grounding": "answer"},
    {"per_example_exposure": True, "num_probe_problems": 1, "hold_window": 2},
    {"objective": "distill+grpo", "num_generations": 2, "per_device_train_batch_size": 1},
], ids=["one alpha", "an alpha for each problem", "groups with rewards"])  # fmt: skip
def test_two_processes_give_the_metrics_of_one(settings, on_processes, monkeypatch, changes):
    # a random model is never right
    odd = lambda self, problems, rollouts: [float(sum(r.response_ids) % 2) for r in rollouts]  # noqa: E731
    monkeypatch.setattr(VerifierReward, "rewards", odd)
    expected = train(settings("one", 1, **changes))
    run_dir, _ = on_processes(2, lambda: train(settings("two", 2, **changes)))
    assert_same(run_dir, expected)
    rows = steady_rows_of(run_dir)
    assert len({row["loss"] for row in rows}) == len({row["alpha"] for row in rows}) == 3
    assert 0 < rows[0].get("verifier_reward", 0.5) < 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["adapter", "all weights, a copy teaches", "all weights, an average teaches"])
def test_shards_give_the_metrics_of_one_process_and_go_on_as_one_and_back(
    settings, on_processes, tmp_path, tiny_model_path, kind, engine
):
    untied = tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.02 * torch.randn(300, 32))
    model.save_pretrained(untied)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(untied)
    changes = {"max_steps": 4, "save_steps": 1} | {
        "adapter": {},
        "all weights, a copy teaches": {"use_peft": False, "model_name_or_path": str(untied)},
        "all weights, an average teaches": {"use_peft": False, "teacher": "ema", "ema_decay": 0.5},
    }[kind]

    def as_shards(go):
        gathered = []
        gather = sharded_head._gathered
        sharded_head._gathered = lambda head: gathered.append(head) or gather(head)
        go()
        return len(gathered)

    def config(processes, **more):
        return settings("many", processes, **changes, **more)

    # layers stay whole until their backward in one case
    variables = engine | ({"FSDP_RESHARD_AFTER_FORWARD": "false"} if "average" in kind else {})
    expected = train(settings("one", 1, **changes))
    many = str(tmp_path / "many")
    gathered = on_processes(2, lambda: as_shards(lambda: stopped_after(config(2), 2)), **variables)
    # once in the whole run where it is frozen, otherwise at the start and after each step
    once_a_step = [0, 0] if engine is ZERO2 else [3, 3] if "use_peft" in changes else [1, 1]
    assert gathered == once_a_step
    stopped_after(config(1, resume=many), 3)
    on_processes(2, lambda: train(config(2, resume=many)), **variables)
    assert_same(Path(many), expected, rounding=1e-4)  # AdamW divides by a gradient's size, and so enlarges its rounding
    weights = "adapter/adapter_model.safetensors" if "use_peft" not in changes else "model/model.safetensors"
    ours, theirs = (load_file(folder / weights) for folder in (Path(many), expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)


def test_another_model_that_teaches_is_sharded_like_the_student(settings, on_processes, other_model_path):
    """Its layers have another class than those that the accelerate config names, and no backward reshards them."""
    other = {"teacher": "model", "teacher_model_name_or_path": str(other_model_path), "max_steps": 2}
    expected = train(settings("one", 1, **other))

    def run():
        kept = []
        make = Run.make_teacher
        Run.make_teacher = lambda self: kept.append(make(self)) or kept[0]
        try:
            run_dir = train(settings("two", 2, **other))
        finally:
            Run.make_teacher = make
        (teacher,) = kept
        held = sum(p.to_local().numel() for p in teacher.model.parameters())
        return run_dir, held / sum(p.numel() for p in teacher.model.parameters()), len(sharded_modules(teacher.model))

    variables = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    (run_dir, share, modules), _ = on_processes(2, run, **FSDP2 | variables)
    assert_same(run_dir, expected)
    assert share == pytest.approx(0.5, abs=0.01) and modules == 3 + 1 + 1  # layers, head, and the rest


def test_a_batch_that_the_processes_of_a_resumed_run_cannot_share_is_refused(settings, on_processes):
    config = settings("run", 1, max_steps=2, save_steps=1)
    stopped_after(config, 1)
    config.resume = config.output_dir
    with pytest.raises(AssertionError, match="takes 8 problems a step, which 3 processes cannot share equally"):
        on_processes(3, lambda: train(config))


@pytest.mark.parametrize(("variables", "named"), [
    ({"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_version must be 2"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params must be false"),
    (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage must be 2 or 3"),
    (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag must be false"),
    (ZERO2 | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device must be none"),
    (ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device must be none"),
    (ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file is not read"),
    (ZERO2 | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping must be left out"),
    (ZERO2 | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "set mixed_precision to 'no'"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set mixed_precision to 'no'"),
])  # fmt: skip
def test_an_accelerate_config_that_does_not_work_here_is_refused_by_name(
    settings, on_processes, monkeypatch, variables, named
):
    monkeypatch.setattr("atesd.parallel.zero.version", lambda name: "0.19.8+unknown")  # of a build from a folder
    engine = {} if "ACCELERATE_USE_DEEPSPEED" in variables else FSDP2
    with pytest.raises(AssertionError, match=named):
        on_processes(2, lambda: train(settings("run", 2)), **{**engine, **variables})


@pytest.mark.parametrize(("installed", "named"), [
    (None, "which is not installed: pip install 'atesd\\[deepspeed\\]'"),
    ("0.18.2", "0.18.2 is installed, older than 0.19.8"),
])  # fmt: skip
def test_a_deepspeed_that_is_missing_or_too_old_is_refused_before_anything_loads(
    settings, monkeypatch, tmp_path, installed, named
):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("atesd.parallel.zero.version", version)
    for name, value in ZERO2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShardingError, match=named):
        train(settings("run", 2))
    assert not (tmp_path / "run").exists()


@needs_deepspeed
@pytest.mark.parametrize("engine", [ZERO2, ZERO3], ids=["ZeRO-2", "ZeRO-3"])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_leaves_no_gradient(settings, on_processes, monkeypatch, engine):
    """The loss alone: the gradient would be finite."""
    distill = Trainer.distill

    def spoilt(self, problems, rollouts, *rest):
        if self.run.student.optimizer.param_groups[0]["lr"] == lrs[1] and self.run.processes.is_main:
            rollouts = [replace(rollouts[0], finite=False), *rollouts[1:]]
        done = distill(self, problems, rollouts, *rest)
        model = self.run.student.model
        assert not any(p.ds_status.name == "AVAILABLE" for p in zero3_parameters(model)), "left gathered"
        return done

    monkeypatch.setattr(Trainer, "distill", spoilt)
    changes = {"max_steps": 4, "lr_scheduler_type": "linear", "max_grad_norm": 1e-4}
    lrs = [0.01 * (1 - t / 4) for t in range(4)]
    expected = train(settings("one", 1, **changes))
    run_dir, _ = on_processes(2, lambda: train(settings("two", 2, **changes)), **engine)
    rows, others = steady_rows_of(run_dir), steady_rows_of(expected)
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0] and rows[1]["grad_norm"] is None
    for t in (0, 2, 3):
        assert rows[t]["grad_norm"] > changes["max_grad_norm"]
        for name in ("loss", "grad_norm", "probe_nll"):
            assert rows[t][name] == pytest.approx(others[t][name], rel=1e-4)


@pytest.mark.parametrize(("weights", "variables"), [
    pytest.param("adapter", {}, id="adapter"),
    pytest.param("merged", FSDP2, id="FSDP2, merged"),
    pytest.param("merged", ZERO3, id="ZeRO-3, merged", marks=needs_deepspeed),
])  # fmt: skip
def test_each_process_asks_a_server_for_its_own_responses_and_the_main_one_sends_the_weights(
    settings, on_processes, server, weights, variables
):
    received = []

    def look(path, body):
        folder = body.get("lora_path") or (body["args"][0] if path == "/collective_rpc" else None)
        if folder:
            received.append(load_file(next(Path(folder).glob("*.safetensors"))))

    server.context, server.look = 2048, look
    served = {
        "rollout_engine": "vllm_server", "vllm_server_base_url": f"http://127.0.0.1:{server.server_port}",
        "vllm_server_weights": weights, "max_steps": 2, "teacher": "live" if variables else "frozen",
    }  # fmt: skip
    train(settings("one", 1, **served))
    alone, expected = list(server.seen), list(received)
    server.seen.clear()
    received.clear()
    run_dir, _ = on_processes(2, lambda: train(settings("two", 2, **served)), **variables)

    assert Counter(path for path, _ in server.seen) == Counter(path for path, _ in alone)
    assert len(received) == len(expected) == 2
    for ours, theirs in zip(received, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    asked = [
        [(b["seed"], b["prompt"], which_adapter(seen, b)) for p, b in seen if p == "/v1/completions"]
        for seen in (server.seen, alone)
    ]
    assert sorted(asked[0]) == sorted(asked[1]) and len({seed for seed, *_ in asked[0]}) == 16
    assert steady_rows_of(run_dir)[-1]["engine_logprob_diff"] > 0


def which_adapter(seen: list[tuple[str, dict]], body: dict) -> int | None:
    """The number, in the order they were loaded, of the adapter a request asks for; None for the model itself."""
    loaded = [sent["lora_name"] for path, sent in seen if path == "/v1/load_lora_adapter"]
    return loaded.index(body["model"]) if body["model"] in loaded else None


@pytest.mark.parametrize("refused", [0, 3], ids=["the weights", "a response of one process"])
def test_what_one_process_is_refused_ends_the_step_of_all_and_the_run_can_go_on(
    settings, on_processes, server, refused
):
    server.context, server.statuses = 2048, [200] * refused + [400]
    served = {"rollout_engine": "vllm_server", "vllm_server_base_url": f"http://127.0.0.1:{server.server_port}"}
    config = settings("run", 2, **served)

    def told() -> str:
        with pytest.raises(RolloutError) as error:
            train(config)
        return str(error.value)

    both = on_processes(2, told)
    assert all("The run is saved as it was after step 0" in message for message in both)
    known = [message for message in both if "400 Bad Request" in message]
    assert len(known) == (2 if refused == 0 else 1)
    config.resume = config.output_dir
    server.seen.clear()
    on_processes(2, lambda: train(config))
    assert [row["step"] for row in steady_rows_of(Path(config.output_dir))] == [1, 2, 3]
    answered = [body for path, body in server.seen if path == "/v1/completions"]
    first = {body["seed"] for body in answered if which_adapter(server.seen, body) == 0}
    assert first == {seed_of(config.seed, i) for i in range(8)}


def scores(handler) -> None:
    """A teacher to whom each token was the likeliest, and the one after it the next; or what `statuses` has instead."""
    status = handler.server.statuses.pop(0) if handler.server.statuses else 200
    listed = [{str(t): {"logprob": -1.0}, str((t + 1) % 300): {"logprob": -2.0}} for t in handler.body["prompt"]]
    handler.reply(status, {"choices": [{"prompt_logprobs": listed}]} if status == 200 else {"error": "as scripted"})


@pytest.fixture
def taught(settings, server):
    """Settings of a run that a server's top token teaches."""
    server.context, server.instead = 2048, {"/v1/completions": scores}
    url = f"http://127.0.0.1:{server.server_port}"
    served = {"teacher": "vllm_server", "teacher_base_url": url, "teacher_top_k": 1, "scoring_temperature": 1.0}
    return lambda name, processes, **changes: settings(name, processes, **served, **changes)


@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_each_process_has_a_server_score_its_own_responses(taught, on_processes, server, variables):
    expected = train(taught("one", 1))
    alone = [body["prompt"] for path, body in server.seen if path == "/v1/completions"]
    server.seen.clear()
    run_dir, _ = on_processes(2, lambda: train(taught("two", 2)), **variables)
    assert_same(run_dir, expected, rounding=1e-3 if variables else 1e-5)
    both = [body["prompt"] for path, body in server.seen if path == "/v1/completions"]
    assert sorted(both) == sorted(alone) and steady_rows_of(run_dir)[-1]["mismatch"] > 0


@pytest.mark.parametrize("refused", [0, 2, 7], ids=["the start", "a reference", "a response of one process"])
def test_a_score_that_one_process_is_refused_ends_the_step_of_all_and_the_run_can_go_on(
    taught, on_processes, server, refused
):
    expected = train(taught("whole", 1))
    server.statuses = [200] * refused + [400]
    config = taught("run", 2)

    def told() -> str:
        with pytest.raises(AtesdError) as error:
            train(config)
        return str(error.value)

    both = on_processes(2, told)
    if refused:
        assert all("The run is saved as it was after step 0" in message for message in both)
        config.resume = config.output_dir
    assert sum("400 Bad Request" in message for message in both) == (1 if refused else 2)
    run_dir, _ = on_processes(2, lambda: train(config))
    assert_same(run_dir, expected)


def start(launcher: list[str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "atesd", "train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def kill_after(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    """SIGKILL to the launcher and all its processes, as soon as there are metrics of `steps` steps."""
    deadline = time.monotonic() + 240
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


CONFIGS = Path(str(resources.files("atesd"))) / "recipes" / "accelerate"


def launch(name: str) -> list[str]:
    config = str(CONFIGS / name)
    return f"-m accelerate.commands.launch --config_file {config} --num_processes 2 --main_process_port 0".split()


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


@needs_deepspeed
@pytest.mark.slow
def test_a_launched_run_under_ZeRO_3_that_is_killed_ends_under_ZeRO_2(settings, tmp_path):
    state = {"max_steps": 5, "save_steps": 1}
    expected = train(settings("one", 1, **state))
    file = settings("many", 2, **state).save(tmp_path / "settings")
    kill_after(start(launch("zero3.yaml"), str(file)), tmp_path / "many", 3)
    finish(start(launch("zero2.yaml"), "--resume", str(tmp_path / "many")))
    assert_same(tmp_path / "many", expected, rounding=1e-4)


@pytest.mark.slow
def test_a_launched_run_killed_on_two_processes_goes_on_on_one_and_ends_as_two_shards(settings, tmp_path):
    assert sorted(path.name for path in CONFIGS.iterdir()) == ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"]
    state = {"teacher": "ema", "ema_decay": 0.9, "hold_window": 2, "lookahead": 3}
    state |= {"max_steps": 7, "warmup_steps": 3, "lr_scheduler_type": "cosine", "num_train_problems": 9}
    expected = train(settings("one", 1, **state))
    run_dir = tmp_path / "many"
    file = settings("many", 2, **state).save(tmp_path / "settings")
    kill_after(start(launch("ddp.yaml"), str(file)), run_dir, 3)
    kill_after(start([], "--resume", str(run_dir)), run_dir, 5)
    finish(start(launch("fsdp2.yaml"), "--resume", str(run_dir)))
    assert_same(run_dir, expected, rounding=1e-4)
