"""What `test_vocabulary_shards` and each of its ranks (`shard_rank`) compute: the calls, whole, the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atesd_kernels import linear_divergence, linear_logprobs, planning, reference

from .cases import DIVERGENCES, clip_between_entries, make_pair

BETA = 0.3
OWN_PAIR = dict(n=5, scale=0.3)
# of a batch whose rows lie on several ranks
ROW_OPTIONS = {
    "mean over all ranks' tokens": {},
    "entry clip": dict(divergence="jsd", entry_clip=0.01, temperature=1.1),
}
# of a teacher known by its top entries
TOPK_OPTIONS = {
    "plain": {},
    "every option": dict(
        divergence="jsd", softcap=8.0, student_bias="bias", temperature=1.3, mask="mask", token_weight="weight",
        num_tokens=1000, targets="targets", return_stats=True,
    ),
    "small chunks": dict(chunk_bytes=60 * 8 * 5, mask="mask"),
}  # fmt: skip


@dataclass
class Case:
    """A pair by its recipe, and options; a string names a tensor or clip that `whole_call` makes."""

    pair: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    trained_head: bool = True
    upstream: bool = False  # a gradient of its own for every token
    function: Callable = linear_divergence


def shares(vocab: int, world: int) -> list[int]:
    """Uneven, and with three ranks one that has hardly any."""
    last = vocab * 2 // 5 if world == 2 else 3
    middle = [] if world == 2 else [vocab * 2 // 5 - last]
    return [vocab - last - sum(middle), *middle, last]


def all_cases() -> dict[str, Case]:
    found = {}
    for divergence in DIVERGENCES:
        of = dict(divergence=divergence, beta=BETA)
        everything = dict(
            softcap=8.0, student_bias="bias", teacher_bias="other", temperature=1.3, mask="mask", token_weight="weight",
            num_tokens=1000, targets="targets", return_stats=True,
        )  # fmt: skip
        for head in ("shared", "separate"):
            pair = dict(shared=head == "shared")
            found[f"{divergence}, {head}"] = Case(pair, dict(of, temperature=1.1))
            found[f"{divergence} with every option, {head}"] = Case(pair, dict(of, **everything))
            found[f"{divergence} far apart, {head}"] = Case(dict(pair, scale=8.0), of)
            # a share's clipped terms do not cancel among themselves: their sum is rounded, at random over many tokens
            found[f"{divergence} with entry_clip, {head}"] = Case(dict(pair, n=67), dict(of, entry_clip="entry"))
            found[f"{divergence} with token_clip, {head}"] = Case(pair, dict(of, token_clip="token"))
            bf16 = dict(pair, n=67, h=48, v=1009, dtype=torch.bfloat16)
            found[f"{divergence} in bf16, {head}"] = Case(bf16, dict(of, temperature=1.1))
        rows = dict(of, reduction="none")
        found[f"{divergence} per token"] = Case({}, rows, upstream=True)
        found[f"{divergence} per token, frozen head"] = Case({}, rows, upstream=True, trained_head=False)
    stats = dict(targets="targets", return_stats=True)
    absent = dict(student_bias="absent", targets="present", return_stats=True)
    found["statistics"] = Case({}, stats)
    found["statistics, separate"] = Case(dict(shared=False), stats)
    found["statistics far apart"] = Case(dict(scale=8.0), stats)
    found["logits far below zero"] = Case({}, dict(stats, student_bias="low"))
    apart = dict(stats, student_bias="first", teacher_bias="second")
    found["statistics of top tokens at one place of two shards"] = Case({}, apart)
    found["two temperatures"] = Case({}, dict(temperature=0.5, teacher_temperature=0.7))
    found["absent entries"] = Case({}, absent)
    found["absent entries, separate"] = Case(dict(shared=False), dict(absent, teacher_bias="absent"))
    found["small chunks"] = Case({}, dict(chunk_bytes=60 * 8 * 5, mask="mask"))
    found["several blocks"] = Case(dict(n=3, v=3 * planning.CPU_BLOCK_COLUMNS), stats)
    half = dict(dtype=torch.float16)
    found["fp16"] = Case(dict(half, n=67), dict(stats, divergence="jsd", beta=BETA))
    found["fp16, separate"] = Case(dict(half, n=67, shared=False), dict(mask="mask"))
    found["log-probabilities in fp16"] = Case(half, dict(targets="targets"), True, True, linear_logprobs)
    found["float64"] = Case(dict(dtype=torch.float64))
    found["float64, separate"] = Case(dict(dtype=torch.float64, shared=False), dict(divergence="jsd"))
    for name, views in (("views", (None, None)), ("views with heads", (20, None, 16))):
        of = dict(views=views)
        found[name] = Case(of, dict(stats, temperature=1.1, divergence="jsd"))
        capped = dict(stats, softcap=8.0, student_bias="bias", teacher_bias="biases", mask="mask", temperature=1.3)
        found[f"{name} with every option"] = Case(of, capped)
        found[f"{name} with absent entries"] = Case(of, dict(stats, teacher_bias="absences", targets="present"))
        found[f"{name} far apart, per token"] = Case(dict(of, scale=8.0), dict(reduction="none"), upstream=True)
        found[f"{name} in bf16"] = Case(dict(of, n=67, h=16, v=1009, dtype=torch.bfloat16), {})
    options = dict(temperature=1.3, softcap=8.0, bias="bias", targets="targets", mask="mask", return_stats=True)
    for trained in (True, False):
        name = "log-probabilities" + ("" if trained else ", frozen head")
        found[name] = Case({}, options, trained, True, linear_logprobs)
    absent = dict(bias="absent", targets="present")
    found["log-probabilities with absent entries"] = Case({}, absent, True, True, linear_logprobs)
    bf16 = dict(n=67, h=48, v=1009, dtype=torch.bfloat16)
    found["log-probabilities in bf16"] = Case(bf16, dict(targets="targets"), True, True, linear_logprobs)
    return found


FEW_ROWS = 5
SIMPLE = ("forward_kl", "jsd")  # with a known sum of derivatives, and without


def triton_cases() -> dict[str, Case]:
    """The cases of backend "triton", with fewer rows, because an interpreter takes 0.1 s for each; and of a divergence
    but JSD one kind of head each. Other tests compare every divergence over a whole head."""
    found = {}
    for name, case in all_cases().items():
        divergence, dtype = case.options.get("divergence"), case.pair.get("dtype", torch.float32)
        if dtype == torch.float64 or (dtype == torch.bfloat16 and divergence not in (None, "jsd")):
            continue
        of_each = case.function is linear_divergence and name.startswith(f"{divergence}")
        heads = ", separate" if "every option" in name or "far apart" in name else ", shared"
        if of_each and dtype == torch.float32 and not name.endswith(heads) and divergence != "jsd":
            continue
        rows = 13 if "statistics" in name or "entry_clip" in name else 3 if "blocks" in name else FEW_ROWS
        found[name] = replace(case, pair={**case.pair, "n": rows})
    return found


def computed(backend: str, name: str, world: int) -> bool:
    """Whether `world` ranks compute the case. In the interpreter, two ranks take only two of the divergences: three
    ranks, one of which has hardly any rows, take all of them."""
    divergence = CASES[backend][name].options.get("divergence", "forward_kl")
    return backend == "torch" or world > 2 or divergence in SIMPLE


def squared(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """A divergence of one's own: the sum over the vocabulary of (p - q)^2."""
    p, q = log_p.exp(), log_q.exp()
    return (p - q) ** 2, 2 * (q - p) * q


class Own:
    """A caller's backend, which knows no shards."""

    divergence_rows = divergence_logits = logprob_rows = staticmethod(print)


# A backend's cases. The kernels run in Triton's interpreter, which a GPU's presence turns off.
CASES = {"torch": all_cases()}
if planning.unavailable("triton", torch.device("cpu")) is None:
    CASES["triton"] = triton_cases()


@dataclass
class Call:
    """A case's tensors, whole: the same on every rank and in the test. Those of several views are lists."""

    tensors: dict[str, Any]
    options: dict[str, Any]
    upstream: Tensor | None


def whole_call(case: Case) -> Call:
    pair = make_pair(**{"n": 13, "h": 16, "v": 101, "scale": 0.07, **case.pair})
    n, v = len(pair.student_hidden), len(pair.student_weight)
    g = torch.Generator().manual_seed(5)
    bias, other = torch.randn(2, v, generator=g)
    hidden_entries = v * 2 // 5  # all that the last rank has, and more
    absent = torch.zeros(v)
    absent[-hidden_entries:] = -torch.inf
    named = {
        "bias": bias,
        "other": other,
        "low": bias - 100,
        "first": torch.zeros(v).index_fill(0, torch.tensor(0), 9.0),
        "second": torch.zeros(v).index_fill(0, torch.tensor(shares(v, 2)[0]), 9.0),  # the second shard of three too
        "absent": absent,
        "biases": [bias, other, bias][: len(case.pair.get("views", ()))],
        "absences": [absent, bias, other][: len(case.pair.get("views", ()))],
        "mask": torch.arange(n) % 5 % 3 != 1,
        "weight": torch.rand(n, generator=g),
        "targets": torch.randint(0, v, (n,), generator=g),
        "present": torch.randint(0, v - hidden_entries, (n,), generator=g),
    }
    divergence = case.options.get("divergence", "forward_kl")
    if "entry_clip" in case.options:
        named["entry"] = clip_between_entries(pair, divergence, BETA)
    if "token_clip" in case.options:
        tokens = reference.linear_divergence(
            pair.student_hidden, pair.student_weight, pair.teacher_hidden, pair.teacher_weight, divergence=divergence,
            beta=BETA, reduction="none",
        )  # fmt: skip
        named["token"] = tokens.sort().values[n // 2 : n // 2 + 2].mean().item()
    options = {
        k: named.get(o, o) if isinstance(o, str) and k not in ("divergence", "reduction") else o
        for k, o in case.options.items()
    }
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    tensors = dict(zip(names, pair.tensors, strict=True))
    if pair.teacher_mix is not None:
        options["teacher_mix"] = pair.teacher_mix
    if case.function is linear_logprobs:
        tensors = {"hidden": pair.student_hidden, "weight": pair.student_weight}
    return Call(tensors, options, torch.randn(n, generator=g) if case.upstream else None)


def each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies `function` to a tensor, or to the tensors of a list. None stays None."""
    if isinstance(value, list):
        return [each(function, x) for x in value]
    return value if value is None else function(value)


def evaluate(function: Callable, call: Call, cut: Callable[[Tensor], Tensor], trained_head: bool, **more) -> dict:
    """Value, statistics and gradients, of the head and biases as `cut` leaves them."""
    tensors = {k: v if "hidden" in k else each(cut, v) for k, v in call.tensors.items()}
    options = {k: each(cut, o) if "bias" in k else o for k, o in call.options.items()}
    student = [name for name in ("student_hidden", "student_weight", "hidden", "weight") if name in tensors]
    for name in student[: 1 + trained_head]:
        tensors[name] = tensors[name].clone().requires_grad_()
    bias = next((k for k in ("student_bias", "bias") if k in options), None)
    if bias is not None and trained_head:
        options[bias] = options[bias].clone().requires_grad_()
    result = function(**tensors, **options, **more)
    value, stats = result if options.get("return_stats") else (result, None)
    (value if call.upstream is None else (value * call.upstream).sum()).backward()
    return {
        "value": value.detach(),
        "stats": stats,
        "hidden_grad": tensors[student[0]].grad,
        "weight_grad": tensors[student[1]].grad,
        "bias_grad": None if bias is None else options[bias].grad,
    }
