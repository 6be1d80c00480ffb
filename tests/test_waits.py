"""The loop makes the host wait for the GPU only where it must, counted on a CPU by what would wait on a GPU.

Counted as a wait: an operator whose result the host needs before it can go on. These are reading a value (`item`,
`float`, `bool`), `tolist`, `cpu`, `numpy`, `equal`, and everything whose output size depends on values (`nonzero`,
boolean indices, `masked_select`, `unique`, `repeat_interleave` by a tensor).

Counted as a pageable copy: a tensor made of Python numbers with a `device` argument, anywhere, and `.to(device)` in
atesd's own code. On a CPU neither copies anything, so the calls stand in for the copies. The exception is
`atesd.models.batching.to_device`, because it goes through pinned memory. `pack` is also run with the device "meta",
where the copies do happen and every look at a value fails.

Not counted: the inside of `atesd_kernels`, whose torch backend and checks read values on a CPU only, and
`attention.packed`'s reading of `PackedBatch.ends`, which is on the CPU everywhere. test_waits_gpu.py covers both.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import assert_same_responses, pack
from atesd.objectives import Distillation, Mixed, PolicyGradient
from atesd.reports.metrics import PhaseTimer
from atesd.rollout import hf
from atesd.rollout.hf import HFEngine
from atesd.rollout.mismatch import EngineMismatch
from atesd.run import Run
from atesd.trainer import Trainer

WAITING_OPERATORS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "repeat_interleave",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITING_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
CONSTRUCTORS = {torch.tensor, torch.as_tensor, torch.asarray}
PACKAGES = ("atesd", "atesd_kernels", "transformers")
PROMPTS = [[5, 6, 7], [8, 40, 41, 42, 43, 44, 45, 46], [9, 10], [11, 12, 13, 14], [100, 101, 102]]


def caller() -> str:
    """The innermost function of `PACKAGES` that is running, as module:function."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in PACKAGES:
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the test"


def names_device(value: object) -> bool:
    return isinstance(value, (str, torch.device))


class Waits:
    """`with Waits() as seen:` counts `seen.waits` and `seen.copies`, each by caller; see the top of the file."""

    def __init__(self):
        self.waits, self.copies = Counter(), Counter()
        self.modes = (Operators(self), Calls(self))

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def wait(self):
        where = caller()
        if not where.startswith(("atesd_kernels.", "atesd.models.attention.packed:")):
            self.waits[where] += 1

    def copy(self):
        where = caller()
        if where != "atesd.models.batching:to_device":
            self.copies[where] += 1


class Operators(TorchDispatchMode):
    """What torch's own code waits for, wherever it is called from."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITING_OPERATORS or by_mask:
            self.seen.wait()
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """What reaches no operator on a CPU."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITING_METHODS:
            self.seen.wait()
        result = func(*args, **kwargs)
        if func in CONSTRUCTORS and kwargs.get("device") is not None and result.numel():
            self.seen.copy()
        moved = func is torch.Tensor.to and any(map(names_device, (*args[1:], kwargs.get("device"))))
        if moved and caller().startswith("atesd."):
            self.seen.copy()
        return result


@pytest.fixture
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    torch.manual_seed(1)  # a random model with a tied head repeats its last token for ever; this one wanders
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    use_packed_attention(model)
    return model


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The engine a GPU has: its loop runs ahead, and no weights are packed for a processor."""
    monkeypatch.setattr("atesd.rollout.decoding.layers.onednn_packs", lambda dtype: False)

    def engine(*args, **kwargs):
        made = HFEngine(*args, **kwargs)
        made.runs_ahead = True
        return made

    return engine


def test_the_counter_sees_each_kind_of_wait_and_each_kind_of_copy():
    x = torch.arange(4)
    waiting = [
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: float(x[0]), lambda: int(x[0]), lambda: x.tolist(),
        lambda: x[x > 1], lambda: x.clone().__setitem__(x > 1, 0), lambda: torch.equal(x, x + 1), lambda: x.nonzero(),
        lambda: x.masked_select(x > 1), lambda: x.unique(), lambda: torch.repeat_interleave(x, x), lambda: x.cpu(),
    ]  # fmt: skip
    for wait in waiting:
        with Waits() as seen:
            wait()
        assert seen.waits.total() == 1
    with Waits() as seen:
        x[x.flip(0)] = x.masked_fill(x > 1, 0) + torch.where(x > 1, 1, x)
        torch.tensor([1, 2])
    assert not seen.waits and not seen.copies
    with Waits() as seen:
        torch.tensor([1, 2], device="cpu")
        torch.as_tensor(3, device=torch.device("cpu"))
    assert seen.copies.total() == 2


@pytest.mark.parametrize("prompts", [PROMPTS, [p[:2] for p in PROMPTS]], ids=["padded", "of one length"])
def test_decoding_waits_once_every_few_tokens_and_copies_nothing(model, tokenizer, as_on_a_gpu, prompts):
    def waits(length):
        engine = as_on_a_gpu(model, tokenizer, max_completion_length=length, top_k=20, top_p=0.9)
        engine.stop_ids = [-1]
        with Waits() as seen:
            rollouts = engine.generate(prompts)
        assert all(len(r.response_ids) == length for r in rollouts)
        return seen

    short, long = waits(32), waits(96)
    assert (long.waits - short.waits).total() <= 64 / hf.CHECK_INTERVAL
    assert not long.copies - short.copies
    per_call = short.waits.total() - 32 / hf.CHECK_INTERVAL
    assert per_call <= 12, f"beside those of its tokens, a call waits {per_call} times: {short.waits}"
    assert not [where for where in short.copies if where.startswith("atesd.")], "generate's own are left"


def test_rows_that_end_on_the_way_add_no_wait(model, tokenizer, as_on_a_gpu):
    engine = as_on_a_gpu(model, tokenizer, max_completion_length=64)
    engine.stop_ids = list(range(3, 12))
    with Waits() as seen:
        rollouts = engine.generate(PROMPTS)
    lengths = [len(r.response_ids) for r in rollouts]
    assert len(set(lengths)) > 2
    looks, results = max(lengths) / hf.CHECK_INTERVAL + 1, 3
    assert seen.waits["atesd.rollout.hf:decode"] <= looks + results


@pytest.mark.parametrize("interval", [1, 3, 8, 100])
def test_looking_at_the_end_less_often_changes_no_response(model, tokenizer, as_on_a_gpu, monkeypatch, interval):
    def responses(make):
        engine = make(model, tokenizer, max_completion_length=40)
        engine.stop_ids = [tokenizer.pad_token_id, *range(3, 12)]  # what an ended row writes may be an end token
        return engine.generate(PROMPTS)

    monkeypatch.setattr(hf, "CHECK_INTERVAL", interval)
    with torch.no_grad():
        model.model.embed_tokens.weight[PROMPTS[3][1]] = torch.nan  # one prompt has no distribution
    expected = responses(HFEngine)
    assert len({len(r.response_ids) for r in expected}) > 2
    assert [r.finite for r in expected] == [True, True, True, False, True]
    assert responses(as_on_a_gpu) == expected


def test_a_cpu_decodes_no_token_in_vain(model, tokenizer):
    engine = HFEngine(model, tokenizer, max_completion_length=40)
    engine.stop_ids = list(range(290))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))  # the packed twin is a copy, and carries it along
    longest = max(len(r.response_ids) for r in engine.generate(PROMPTS))
    assert len(calls) == longest < hf.CHECK_INTERVAL


def test_packing_is_one_copy_and_the_check_of_the_responses_reads_nothing():
    class ToDevice(TorchDispatchMode):
        copies = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("_to_copy", "copy_") and result.is_meta:
                self.copies += 1
            return result

    responses = [[20, 21], [22, 23, 24, 25], [26]]
    with ToDevice() as seen, Waits() as waits:
        student = pack([[5, 6, 7], [8], [9, 10]], responses, "meta")
        teacher = pack([[5], [8, 1, 1], [9, 10]], responses, "meta")
        assert_same_responses(student, teacher)
    assert seen.copies == 2
    assert student.targets.is_meta and student.input_ids.shape == (1, 13)
    assert not waits.waits and not waits.copies


OBJECTIVES = {
    "distill": Distillation(),
    "every weight there is": Mixed(Distillation(position_halflife=8.0), PolicyGradient()),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_waits_for_nothing_and_copies_from_pinned_memory_only(objective, tiny_config):
    trainer = Trainer(Run.build(tiny_config(exposure_policy="full", per_device_train_batch_size=1)))
    trainer.run.objective = OBJECTIVES[objective]
    problems = [trainer.run.data.problems.train[i] for i in range(6)]
    rollouts = trainer.run.rollout.engine.generate([trainer.run.data.prompts.student(p) for p in problems])
    advantages = None
    if trainer.run.objective.needs_reward:
        advantages = [0.5, -0.5, 1.0, -1.0, 0.0, 0.25]
        rollouts = [replace(r, logprobs=[-1.0] * len(r.response_ids)) for r in rollouts]
        trainer.run.engine_mismatch = EngineMismatch(clip=2.0)

    def distill(count):  # micro-batches of one
        with Waits() as seen:
            trainer.distill(problems[:count], rollouts[:count], [1.0] * count, advantages and advantages[:count])
        return seen

    distill(1)  # what happens once only is no micro-batch's
    few, many = distill(2), distill(6)
    assert few.waits == many.waits == {"atesd.trainer:distill": 1}, "the step's loss"
    assert not few.copies and not many.copies
    trainer.run.close()


def test_a_phase_on_a_gpu_waits_only_when_its_seconds_are_taken(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    def no_wait():
        raise AssertionError("the whole device is waited for")

    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", no_wait)
    timer = PhaseTimer()
    for _ in range(3):
        with timer.phase("student"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timer.phase("teacher"):
        raise KeyError("still counted")
    assert not waited
    seconds = timer.take()
    assert 0.03 <= seconds["seconds_student"] < 0.5 and "seconds_teacher" in seconds
    assert waited and timer.take() == {}
