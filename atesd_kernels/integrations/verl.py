"""verl: this library's divergences under names of your own in its registry of distillation losses.

verl gives a loss the student's logits and the log-probabilities of the teacher's top k tokens, no hidden states: what
`linear_divergence` saves cannot be saved here. What its own top-k loss lacks is a divergence. It sums p (log p - log q)
over the k tokens, whose probabilities do not sum to one: the sum may be negative, and is then cut off at zero together
with its gradient. Here the other tokens are one more entry, the rest. Both sides are then distributions over k + 1
entries, and any divergence and clip applies. Merging entries never increases an f-divergence: without a clip, the value
is a lower bound of the whole one.

Put `register` into a module of yours and name that module in VERL_USE_EXTERNAL_MODULES, which verl imports in every
process; then set `distillation.distillation_loss.loss_mode` to the name and `use_policy_gradient` to false.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atesd_kernels import divergence
from atesd_kernels.integrations.source import fingerprint, installed_version

VERSION = "0.9.1"
EXPECTED = {
    "compute_topk_loss": "5d636620cdcd",
    "compute_forward_kl_topk": "b01907bd74d6",
    "distillation_ppo_loss": "e9a369f27afa",
}
STRATEGIES = ("fsdp", "fsdp2", "veomni")  # those whose student logits hold the whole vocabulary
LEAST_REST = 1e-6  # a rest below fp32's spacing at one is noise (our choice)

registered: dict[str, dict[str, Any]] = {}


def register(name: str, **options: Any) -> None:
    """Make `loss_mode: name` the divergence of the teacher's and the student's top-k-and-rest distributions.

    Args:
        name: for verl's configuration; must be new to its registry.
        options: of `divergence`: `divergence`, `beta`, `entry_clip`, `token_clip`. verl has divided the student's
            logits by the temperature. Its `loss_max_clamp` applies to a token's value, `log_prob_min_clamp` to nothing.

    Raises:
        RuntimeError: the installed verl's functions are not those this adapter was written for.
        ValueError, TypeError: an option that `divergence` refuses, or a name already registered.

    Example:
        `register("atesd_jsd", divergence="jsd", beta=0.5, token_clip=1.0)`, then `loss_mode: atesd_jsd`.
    """
    divergence(torch.zeros(1, 2), torch.zeros(1, 2), **{**options, "reduction": "none"})
    losses: Any = importlib.import_module("verl.trainer.distillation.losses")
    if not registered:
        differing = [
            f for f, digits in EXPECTED.items() if not hasattr(losses, f) or fingerprint(getattr(losses, f)) != digits
        ]
        if differing:
            raise RuntimeError(
                f"{', '.join(differing)} in the installed verl {installed_version('verl')} differ from verl "
                f"{VERSION}, which this adapter was written for. Install verl=={VERSION}."
            )
    settings = losses.DistillationLossSettings(names=[name], use_topk=True)
    # the registered function collects what the logits' processor has computed, and is the same for every top-k loss
    losses.register_distillation_loss(settings)(losses.compute_forward_kl_topk)
    if not registered:
        losses.compute_topk_loss = _dispatching(losses.compute_topk_loss)
    registered[name] = options


def _dispatching(original: Callable) -> Callable:
    """verl calls one top-k loss whatever the mode: for modes registered here, call ours."""

    def compute_topk_loss(config, distillation_config, data, student_logits: Tensor, data_format: str):
        options = registered.get(distillation_config.distillation_loss.loss_mode)
        if options is None:
            return original(config, distillation_config, data, student_logits, data_format)
        if config.strategy not in STRATEGIES:
            raise NotImplementedError(
                f"strategy {config.strategy!r} shards the logits' vocabulary; losses of atesd_kernels run with "
                f"{', '.join(STRATEGIES)}."
            )
        return topk_divergence(student_logits, data["teacher_logprobs"], data["teacher_ids"], **options)

    return compute_topk_loss


def topk_divergence(student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, **options: Any) -> dict:
    """Divergence over the teacher's top k and the rest, in the form of verl's top-k losses.

    Args:
        student_logits: `(1, tokens, V)`, this rank's tokens under sequence parallelism.
        teacher_logprobs, teacher_ids: nested `(sequences, tokens, k)`, all tokens.

    Returns:
        `distillation_losses`, `student_mass` and `teacher_mass`, `(1, tokens)` each.
    """
    ulysses = importlib.import_module("verl.utils.ulysses")
    log_p, ids = (t.values().unsqueeze(0) for t in (teacher_logprobs, teacher_ids))
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        log_p, ids = (ulysses.slice_input_tensor(t, dim=1) for t in (log_p, ids))
    z = student_logits.gather(-1, ids).float()
    p, teacher_mass = _with_rest(log_p.float())
    q, student_mass = _with_rest(z - torch.logsumexp(student_logits.float(), -1, keepdim=True))
    values = divergence(q, p, **{**options, "reduction": "none"})
    return {"distillation_losses": values, "student_mass": student_mass, "teacher_mass": teacher_mass}


def _with_rest(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """`(..., k)` -> `(..., k + 1)`, the last entry being log(1 - sum of probabilities), and that sum."""
    mass = logprobs.exp().sum(-1)
    rest = torch.log1p(-mass.clamp_max(1 - LEAST_REST))
    return torch.cat([logprobs, rest[..., None]], -1), mass
