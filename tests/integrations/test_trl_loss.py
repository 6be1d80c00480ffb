"""TRL's trainers with `linear_divergence` train as they do without it, and hold no logits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("trl", reason="trl is not installed")

import atesd_kernels
from atesd_kernels import divergence
from atesd_kernels.integrations import trl as adapter
from atesd_kernels.integrations.source import UnexpectedSourceError
from atesd_kernels.integrations.trl import use_linear_divergence

from .trl_trainers import SDFTTrainer, make_trainer

V = 300


def train(trainer, patch: bool):
    """Logged losses, and how far each parameter went."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    if patch:
        assert use_linear_divergence(trainer)
    torch.manual_seed(0)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in trainer.model.named_parameters() if n in before])
    return losses, moved, trainer.state.log_history


CASES = {
    "sdft, forward KL": ("sdft", {"distillation_alpha": 0.0}),
    "sdft, JSD, stale rollouts, skipped tokens": (
        "sdft",
        {"distillation_alpha": 0.3, "num_iterations": 2, "num_loss_tokens_to_skip": 2, "temperature": 1.3},
    ),
    "sdft, ema teacher, sampled token": (
        "sdft",
        {"teacher_model_kind": "ema", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    ),
    "sdpo, reverse KL": ("sdpo", {"distillation_alpha": 1.0, "success_reward_threshold": 0.5}),
    "sdpo with its policy loss": ("sdpo", {"distillation_weight": 0.5, "num_iterations": 2}),
    "gkd": ("gkd", {"temperature": 0.9}),
    "distillation": ("distillation", {"beta": 0.3, "temperature": 1.2}),
}


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_patched_trainer_trains_as_the_unpatched_one(case, lora, sharp_model_path, tmp_path):
    kind, changes = CASES[case]
    (theirs, moved, log), (ours, also_moved, our_log) = (
        train(make_trainer(kind, sharp_model_path, tmp_path, lora=lora, **changes), patch) for patch in (False, True)
    )
    assert len(theirs) == 3 and max(map(abs, theirs)) > 1e-3
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-7)
    # after an update too: Adam's first steps divide rounding noise by itself, which the next losses show
    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-7)
    assert (also_moved - moved).norm() <= 2e-2 * moved.norm()
    for mine, other in zip(our_log, log, strict=True):
        for name in set(other) - {"epoch"}:
            if "loss" in name or name == "entropy":
                assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("kind", ["sdft", "gkd", "distillation"])
def test_training_in_bf16_follows_training_in_fp32(kind, sharp_model_path, tmp_path):
    changes = {"max_steps": 1, "lmbda": 0.0} if kind == "gkd" else {"max_steps": 1}
    (exact, *_), (rounded, *_) = (
        train(make_trainer(kind, sharp_model_path, tmp_path, lora=True, bf16=bf16, **changes), True)
        for bf16 in (False, True)
    )
    assert rounded == pytest.approx(exact, rel=0.05)


def largest_logits(trainer, batch) -> int:
    """Rows of the largest tensor `[..., V]` that any operation of a forward and backward reads, heads left aside."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    heads = {(V, 32), (32, V)}
    shapes = {tuple(s) for event in seen.events() for s in event.input_shapes if s and s[-1] == V}
    return max((math.prod(s[:-1]) for s in shapes - heads), default=0)


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
@pytest.mark.parametrize("kind", ["sdft", "sdpo", "gkd", "distillation"])
def test_no_activation_of_tokens_by_vocabulary_is_allocated(kind, lora, sharp_model_path, tmp_path):
    teacher = {"teacher_model_kind": "base"} if kind in ("sdft", "sdpo") else {}
    trainer = make_trainer(kind, sharp_model_path, tmp_path, lora=lora, **teacher)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in (0, 0, 1, 1)]
    if kind == "gkd":
        batch = trainer.data_collator(rows)
        tokens = batch["labels"].ne(-100).sum()
    elif kind == "distillation":
        batch = trainer._generate_and_score_completions(rows)
        tokens = batch["completion_mask"].sum()
    else:
        batch = trainer._prepare_training_batch(rows)
        tokens = batch["completion_mask"].sum()
    dense = largest_logits(trainer, batch)
    chunk_rows = 7
    assert use_linear_divergence(trainer, chunk_bytes=8 * V * chunk_rows)
    assert tokens > 2 * chunk_rows
    # DistillationTrainer's own loss walks over tiles too
    assert dense >= tokens or kind == "distillation"
    assert 0 < largest_logits(trainer, batch) <= chunk_rows


class Server:
    """A teacher's model behind the interface of TRL's client. It gives the log-probs of its most likely tokens."""

    def __init__(self, model):
        self.model, self.syncs = model, 0

    def sync_weights(self):
        self.syncs += 1

    @torch.no_grad()
    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        result = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, prompt in zip(sequences, prompt_lengths, strict=True):
            logits = self.model(torch.tensor([ids])).logits[0, prompt - 1 : -1].float()
            logprobs = (logits / temperature).log_softmax(-1)
            best, tokens = logprobs.topk(top_logprobs)
            result["actual_logprobs"].append(logprobs.gather(1, torch.tensor(ids[prompt:])[:, None]).tolist())
            result["logprobs"].append(best.tolist())
            result["logprob_token_ids"].append(tokens.tolist())
        return result


SERVED = {
    "a tail, forward KL": ("sdft", {"distillation_alpha": 0.0, "distillation_add_tail": True}),
    "a tail, JSD, stale rollouts, skipped tokens": (
        "sdft",
        {
            "distillation_alpha": 0.3, "distillation_add_tail": True, "num_iterations": 2, "temperature": 1.3,
            "num_loss_tokens_to_skip": 2,
        },
    ),
    "no tail": ("sdft", {"distillation_alpha": 0.5, "distillation_add_tail": False}),
    "sdpo": ("sdpo", {"distillation_alpha": 1.0, "distillation_add_tail": True, "success_reward_threshold": 0.5}),
    "sampled token": ("sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", SERVED)
def test_with_a_teacher_on_a_server_a_patched_trainer_trains_as_the_unpatched_one(case, sharp_model_path, tmp_path):
    kind, changes = SERVED[case]
    options = {"distillation_mode": "topk_logits", "distillation_topk": 7, **changes}
    logs = []
    for patch in (False, True):
        trainer = make_trainer(kind, sharp_model_path, tmp_path, lora=True, **options)
        served = make_trainer("gkd", sharp_model_path, tmp_path).teacher_model
        trainer.use_teacher_server, trainer._last_loaded_step = True, -1
        trainer.teacher_client = trainer.vllm_generation = Server(served)
        losses, moved, log = train(trainer, patch)
        logs.append((losses, moved, log, trainer.teacher_client.syncs))
    (theirs, moved, log, syncs), (ours, also_moved, our_log, our_syncs) = logs
    assert len(theirs) == 3 and max(map(abs, theirs)) > 1e-3 and syncs == our_syncs > 0
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-7)
    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-7)
    assert (also_moved - moved).norm() <= 2e-2 * moved.norm()
    named = "self_distillation/server_logprob_abs_diff"
    for mine, other in zip(our_log, log, strict=True):
        assert named not in other or mine[named] == pytest.approx(other[named], rel=2e-3, abs=1e-6)


def test_against_a_server_s_top_k_no_activation_of_tokens_by_vocabulary_is_allocated(sharp_model_path, tmp_path):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, lora=True, distillation_mode="topk_logits")
    trainer.use_teacher_server, trainer._last_loaded_step = True, 0
    served = make_trainer("gkd", sharp_model_path, tmp_path).teacher_model
    trainer.teacher_client = Server(served)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._prepare_training_batch([trainer.train_dataset[i] for i in (0, 0, 1, 1)])
    answers = trainer._get_teacher_token_logprobs_from_server(batch, batch["completion_ids"].shape[1])
    trainer._get_teacher_token_logprobs_from_server = lambda *_: answers  # the server's own logits do not count
    dense = largest_logits(trainer, batch)
    assert use_linear_divergence(trainer, chunk_bytes=7 * (8 * V + 120 * 100 + 32 * V))
    assert dense >= batch["completion_mask"].sum() > 14
    assert 0 < largest_logits(trainer, batch) <= 7


def test_entry_clip_and_the_shared_head_reach_the_loss(sharp_model_path, tmp_path, monkeypatch):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, lora=True, distillation_alpha=0.0, temperature=1.1)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_training_batch([trainer.train_dataset[i] for i in (0, 0, 1, 1)])
    with torch.no_grad():
        dense = trainer._compute_teacher_student_logits(trainer.model, trainer.teacher_model, batch)
        per_token = divergence(
            dense.student_logits, dense.teacher_logits, reduction="none", entry_clip=0.01, mask=dense.loss_mask.bool()
        )
        expected = (per_token.sum(1) / dense.loss_mask.sum(1)).mean()
        unclipped = trainer.compute_loss(trainer.model, batch)
    calls = []
    monkeypatch.setattr(
        adapter,
        "linear_divergence",
        lambda *args, f=adapter.linear_divergence, **options: calls.append((args, options)) or f(*args, **options),
    )
    assert use_linear_divergence(trainer, entry_clip=0.01)
    clipped = trainer.compute_loss(trainer.model, batch)
    assert clipped.item() == pytest.approx(expected.item(), rel=1e-4)
    assert clipped.item() < 0.9 * unclipped.item()
    ((_, student_weight, _, teacher_weight), _), *others = calls
    assert not others and student_weight is teacher_weight


def test_a_batch_without_tokens_costs_nothing_and_keeps_its_graph(sharp_model_path, tmp_path):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, num_loss_tokens_to_skip=50)
    use_linear_divergence(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(
        trainer.model, trainer._prepare_training_batch([trainer.train_dataset[i] for i in (0, 0)])
    )
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_under_ddp_the_hidden_states_come_through_the_wrapper(sharp_model_path, tmp_path):
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, lora=True)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp, calls = nn.parallel.DistributedDataParallel(trainer.model), []
        ddp.register_forward_pre_hook(lambda *_: calls.append("forward"))
        out = adapter.hidden_states(trainer, ddp, **batch).states
        assert calls == ["forward"] and out.grad_fn is not None
        assert out.equal(adapter.hidden_states(trainer, trainer.model, **batch).states)
    finally:
        torch.distributed.destroy_process_group()


def test_a_trl_it_was_not_written_for_is_named_and_left_alone(sharp_model_path, tmp_path):
    class Changed(SDFTTrainer):
        def _forward_logits(self, model, input_ids, attention_mask, logits_to_keep):
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep) * 2

    trainer = make_trainer("sdft", sharp_model_path, tmp_path, trainer_class=Changed)
    before = dict(vars(trainer))
    with pytest.warns(UserWarning, match=r"_forward_logits of Changed in the installed trl .* differ from trl 1\.16"):
        assert use_linear_divergence(trainer, strict=False) is False
    with pytest.raises(UnexpectedSourceError, match=r"_forward_logits of Changed .* Install trl==1\.16"):
        use_linear_divergence(trainer)
    assert vars(trainer) == before


@pytest.mark.parametrize("strict", [True, False])
def test_trls_trainer_with_another_models_server_is_refused_with_what_to_use_instead(strict):
    from trl.experimental.server_distillation import ServerDistillationTrainer

    class Own(ServerDistillationTrainer):
        pass

    for kind in (ServerDistillationTrainer, Own):
        trainer = kind.__new__(kind)  # its constructor waits for a server
        told = rf"^{kind.__name__} is a ServerDistillationTrainer.*use_teacher_server=True.*'topk_logits'"
        with pytest.raises(ValueError, match=told):
            use_linear_divergence(trainer, strict=strict)
        assert not vars(trainer)


def test_what_it_cannot_serve_is_refused_by_name(sharp_model_path, tmp_path):
    with pytest.raises(ValueError, match="none of TRL's SDFTTrainer"):
        use_linear_divergence(object())
    with pytest.raises(ValueError, match="a top-k loss is not a divergence"):
        use_linear_divergence(make_trainer("sdft", sharp_model_path, tmp_path, distillation_mode="topk_logits"))
    sampled = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
    trainer = make_trainer("sdft", sharp_model_path, tmp_path, **sampled)
    with pytest.raises(ValueError, match="sampled_token"):
        use_linear_divergence(trainer, entry_clip=0.05)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="shards its parameters"):
        use_linear_divergence(trainer)


@pytest.mark.parametrize("kind", ["SDFTTrainer", "SDPOTrainer", "GKDTrainer", "DistillationTrainer"])
def test_the_columns_that_the_manual_names_are_enough(kind, sharp_model_path, tmp_path, monkeypatch):
    manual = Path(atesd_kernels.__file__).with_name("README.md").read_text(encoding="utf-8")
    (line,) = (line for line in manual.splitlines() if re.match(rf"\| `trl\.[\w.]+\.{kind}` ", line))
    columns = re.findall(r"`(\w+)`", line.split("|")[2])
    from_list, seen = datasets.Dataset.from_list, []

    def only_those(rows):
        seen.extend({name: row[name] for name in columns} for row in rows)
        return from_list(seen)

    monkeypatch.setattr(datasets.Dataset, "from_list", only_those)
    train(make_trainer(kind.removesuffix("Trainer").lower(), sharp_model_path, tmp_path, lora=True, max_steps=1), True)
    assert seen and set(seen[0]) == set(columns)
