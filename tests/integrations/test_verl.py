"""The divergences in verl's registry. Where verl is not installed, a stand-in has the part of its interface they use.

Everything here passed with verl 0.9.1 itself; `test_the_whole_road_through_verl` needs it, and is skipped without.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from atesd_kernels import divergence, reference
from atesd_kernels.integrations import verl as adapter

TOKENS, VOCAB, K = (3, 4), 40, 6  # of two sequences
REAL = importlib.util.find_spec("verl") is not None


@dataclass
class Settings:
    names: list[str]
    use_topk: bool = False
    use_estimator: bool = False


def stand_in() -> dict[str, ModuleType]:
    losses, ulysses = ModuleType("verl.trainer.distillation.losses"), ModuleType("verl.utils.ulysses")

    def register_distillation_loss(settings):
        def decorator(function):
            for name in settings.names:
                if name in losses.DISTILLATION_LOSS_REGISTRY:
                    raise ValueError(f"Distillation loss function with name '{name}' is already registered.")
                losses.DISTILLATION_LOSS_REGISTRY[name] = function
            return function

        return decorator

    def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
        return "verl's own"

    losses.DISTILLATION_LOSS_REGISTRY = {}
    losses.DistillationLossSettings = Settings
    losses.register_distillation_loss = register_distillation_loss
    losses.compute_topk_loss = compute_topk_loss

    def not_called(config, distillation_config, model_output, data):
        raise AssertionError

    losses.compute_forward_kl_topk = losses.distillation_ppo_loss = not_called
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
    return {"verl.trainer.distillation.losses": losses, "verl.utils.ulysses": ulysses}


@pytest.fixture
def losses(monkeypatch):
    """verl's module of losses, and the adapter, as they are before anything is registered."""
    if REAL:
        module = importlib.import_module("verl.trainer.distillation.losses")
    else:
        for name, stub in stand_in().items():
            monkeypatch.setitem(sys.modules, name, stub)
        module = sys.modules["verl.trainer.distillation.losses"]
        monkeypatch.setattr(adapter, "EXPECTED", {f: adapter.fingerprint(getattr(module, f)) for f in adapter.EXPECTED})
    for registry in ("DISTILLATION_LOSS_REGISTRY", "DISTILLATION_SETTINGS_REGISTRY")[: 1 + REAL]:
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))
    monkeypatch.setattr(module, "compute_topk_loss", module.compute_topk_loss)
    monkeypatch.setattr(adapter, "registered", {})
    return module


def nested(rows: torch.Tensor) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows.split(TOKENS)), layout=torch.jagged)


def batch(k: int = K):
    """Student's logits `(1, 7, 40)`, and what verl's teacher sends; the teacher's whole log-softmax."""
    g = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(1, sum(TOKENS), VOCAB, generator=g)
    teacher = (student[0] + 0.5 * torch.randn(sum(TOKENS), VOCAB, generator=g)).log_softmax(-1)
    found, ids = teacher.topk(k)
    return student.requires_grad_(), {"teacher_logprobs": nested(found), "teacher_ids": nested(ids)}, teacher


def configs(mode: str, strategy: str = "fsdp"):
    return SimpleNamespace(strategy=strategy), SimpleNamespace(distillation_loss=SimpleNamespace(loss_mode=mode))


def topk_and_rest(whole: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the k tokens and of all others, which are summed one by one."""
    others = torch.ones_like(whole).scatter(-1, ids, 0.0) * whole.exp()
    return torch.cat([whole.gather(-1, ids), others.sum(-1, keepdim=True).log()], -1)


OPTIONS = (
    dict(divergence="forward_kl"),
    dict(divergence="jsd", beta=0.3),
    dict(divergence="reverse_kl", token_clip=0.05),
    dict(divergence="forward_kl", entry_clip=0.02),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_registered_loss_is_the_divergence_of_the_top_k_and_the_rest(losses, options):
    adapter.register("mine", **options)
    student, data, teacher = batch()
    found = losses.compute_topk_loss(*configs("mine"), data, student_logits=student, data_format="thd")
    ids, whole = data["teacher_ids"].values(), student.detach().double().requires_grad_()
    merged = [topk_and_rest(w.double().log_softmax(-1), ids) for w in (whole[0], teacher)]
    expected = reference.token_divergence(*merged, **options)
    assert all(value.shape == (1, 7) for value in found.values())
    torch.testing.assert_close(found["distillation_losses"][0].double(), expected, rtol=1e-4, atol=1e-7)
    upstream = torch.arange(7.0)
    (found["distillation_losses"][0] * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert (student.grad - whole.grad).norm() <= 1e-5 * whole.grad.norm()
    torch.testing.assert_close(found["teacher_mass"][0], teacher.gather(-1, ids).exp().sum(-1))


def test_with_all_tokens_among_the_top_it_is_the_whole_divergence_and_with_few_it_is_less(losses):
    adapter.register("mine", divergence="jsd")
    student, data, teacher = batch(VOCAB)
    whole = divergence(student, teacher[None], divergence="jsd", reduction="none")
    every = losses.compute_topk_loss(*configs("mine"), data, student, "thd")["distillation_losses"]
    torch.testing.assert_close(every, whole, rtol=1e-4, atol=1e-6)
    few = losses.compute_topk_loss(*configs("mine"), batch()[1], student, "thd")["distillation_losses"]
    assert (few > 0).all() and (few < whole).all()


def test_other_modes_stay_verl_s_own_and_sharded_logits_are_refused(losses, monkeypatch):
    original = losses.compute_topk_loss
    adapter.register("mine")
    adapter.register("another", divergence="jsd")
    if not REAL:
        assert losses.compute_topk_loss(*configs("forward_kl_topk"), {}, None, "thd") == original(*[None] * 5)
    assert {"mine", "another"} <= set(losses.DISTILLATION_LOSS_REGISTRY)
    with pytest.raises(NotImplementedError, match="'megatron' shards the logits' vocabulary"):
        losses.compute_topk_loss(*configs("another", "megatron"), batch()[1], batch()[0], "thd")
    with pytest.raises(ValueError, match="already registered"):
        adapter.register("mine", divergence="jsd")
    assert adapter.registered["mine"] == {}
    with pytest.raises(ValueError, match="unknown divergence"):
        adapter.register("third", divergence="squred")


def test_the_readme_s_block_registers_its_loss(losses):
    readme = (Path(__file__).parents[2] / "atesd_kernels" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "verl" in block)
    exec(block, {})
    assert losses.compute_topk_loss(*configs("my_jsd"), batch()[1], batch()[0], "thd")["distillation_losses"].min() > 0


def found(versions, name):
    if name not in versions:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions[name]


def test_another_verl_is_refused_with_both_versions(losses, monkeypatch):
    def compute_topk_loss(config, data, student_logits):
        return {}

    monkeypatch.setattr(losses, "compute_topk_loss", compute_topk_loss)
    monkeypatch.delattr(losses, "compute_forward_kl_topk")
    for versions, named in (({"verl": "9.9"}, r"9\.9"), ({}, r"\(of unknown version\)")):  # unpacked, without metadata
        monkeypatch.setattr(importlib.metadata, "version", lambda name, versions=versions: found(versions, name))
        with pytest.raises(
            RuntimeError,
            match=rf"compute_topk_loss, compute_forward_kl_topk in the installed verl {named} differ from verl 0\.9\.1",
        ):
            adapter.register("mine")
    assert "mine" not in losses.DISTILLATION_LOSS_REGISTRY


@pytest.mark.skipif(not REAL, reason="verl is not installed")
def test_the_whole_road_through_verl(losses):
    """Both calls that verl's engine makes: on the logits, and, with what came back, for the batch's loss."""
    from tensordict import TensorDict
    from verl.workers.config import DistillationLossConfig

    adapter.register("mine", divergence="jsd")
    settings = DistillationLossConfig(
        loss_mode="mine", use_policy_gradient=False, use_task_rewards=False, loss_max_clamp=None, topk=K
    )
    assert settings.loss_settings.use_topk
    actor = SimpleNamespace(strategy="fsdp", loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    distillation = SimpleNamespace(distillation_loss=settings)
    student, data, _ = batch()
    found = losses.distillation_ppo_loss(actor, distillation, data=data, student_logits=student)
    prompts, responses = [torch.zeros(1).long(), torch.zeros(2).long()], [torch.zeros(2).long()] * 2
    # of three and four tokens the last two are the response: predicted by the states one before
    whole = TensorDict(
        {
            **data,
            "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
            "responses": torch.nested.as_nested_tensor(responses, layout=torch.jagged),
            "response_mask": torch.ones(2, 2, dtype=torch.bool),
        },
        batch_size=2,
    )
    for name, value in (("dp_size", 1), ("batch_num_tokens", 4), ("global_batch_size", 2)):
        whole.set_non_tensor(name, value)
    output = {name: nested(value[0]) for name, value in found.items()}
    loss, metrics = losses.distillation_ppo_loss(actor, distillation, model_output=output, data=whole)
    torch.testing.assert_close(loss, found["distillation_losses"][0, [0, 1, 4, 5]].mean())
    assert "distillation/student_mass" in metrics
    loss.backward()
    assert (student.grad[0, [0, 1, 4, 5]].norm(dim=-1) > 0).all() and student.grad[0, [2, 3, 6]].eq(0).all()
