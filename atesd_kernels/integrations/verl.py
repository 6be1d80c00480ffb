"""Registers this library's divergences as distillation losses of verl, under names you choose.

verl gives a loss the student's logits and the log-probabilities of the teacher's top k tokens, but no hidden states, so
the memory savings of `linear_divergence` do not apply. verl's own top-k loss is not a divergence. It sums
p (log p - log q) over the k tokens, whose probabilities do not sum to one. The sum may be negative, and is then clamped
to zero, which also zeroes its gradient. Here it is `topk_divergence`: one more entry, the rest, stands for all other
tokens. Both models then have distributions over k + 1 entries, to which every divergence and clip applies. Merging
entries never increases an f-divergence, so without a clip the value is a lower bound of the full divergence.

Call `register` in a module of yours and name that module in VERL_USE_EXTERNAL_MODULES; verl imports it in every
process. Then set `distillation.distillation_loss.loss_mode` to the name and `use_policy_gradient` to false.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import atesd_kernels
from atesd_kernels.integrations.source import UnexpectedSourceError, fingerprint, installed_version

VERSION = "0.9.1"
EXPECTED = {
    "compute_topk_loss": "5d636620cdcd",
    "compute_forward_kl_topk": "b01907bd74d6",
    "distillation_ppo_loss": "e9a369f27afa",
}
STRATEGIES = ("fsdp", "fsdp2", "veomni")  # strategies whose student logits cover the full vocabulary
_NOTHING = (torch.full((1, 1), -1), torch.zeros(1, 1))  # a teacher's entries with which options can be checked

registered: dict[str, dict[str, Any]] = {}


def register(name: str, **options: Any) -> None:
    """Registers `loss_mode: name`: a divergence of the teacher's and the student's top-k-and-rest distributions.

    Args:
        name: name in verl's configuration; must not be registered yet.
        options: `divergence`, `beta`, `tail`, `entry_clip`, `token_clip`, `backend`, `chunk_bytes`. verl already
            divides the student's logits by the temperature. Its `loss_max_clamp` clamps a token's value; its
            `log_prob_min_clamp` has no effect.

    Raises:
        UnexpectedSourceError: if functions of the installed verl differ from those this adapter was written for.
        ValueError, TypeError: if `divergence` rejects an option, or the name is already registered.

    Example:
        `register("atesd_jsd", divergence="jsd", beta=0.5, token_clip=1.0)`, then `loss_mode: atesd_jsd`.
    """
    atesd_kernels.topk_divergence(torch.zeros(1, 2), *_NOTHING, **{**options, "reduction": "none"})
    losses: Any = importlib.import_module("verl.trainer.distillation.losses")
    if not registered:
        differing = [
            f for f, digits in EXPECTED.items() if not hasattr(losses, f) or fingerprint(getattr(losses, f)) != digits
        ]
        if differing:
            raise UnexpectedSourceError(
                f"{', '.join(differing)} in the installed verl {installed_version('verl')} differ from verl "
                f"{VERSION}, which this adapter was written for. Install verl=={VERSION}."
            )
    settings = losses.DistillationLossSettings(names=[name], use_topk=True)
    # the registered function only collects the results of the logits' processor; it is the same for every top-k loss
    losses.register_distillation_loss(settings)(losses.compute_forward_kl_topk)
    if not registered:
        losses.compute_topk_loss = _dispatching(losses.compute_topk_loss)
    registered[name] = options


def _dispatching(original: Callable) -> Callable:
    """Returns a top-k loss that calls ours for modes registered here. verl calls one function for all modes."""

    def compute_topk_loss(config, distillation_config, data, student_logits: Tensor, data_format: str):
        options = registered.get(distillation_config.distillation_loss.loss_mode)
        if options is None:
            return original(config, distillation_config, data, student_logits, data_format)
        if config.strategy not in STRATEGIES:
            raise NotImplementedError(
                f"strategy {config.strategy!r} shards the logits' vocabulary; losses of atesd_kernels run with "
                f"{', '.join(STRATEGIES)}."
            )
        return loss_of_logits(student_logits, data["teacher_logprobs"], data["teacher_ids"], **options)

    return compute_topk_loss


def loss_of_logits(student_logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, **options: Any) -> dict:
    """Divergence over the teacher's top k tokens and the rest, with the interface of verl's top-k losses.

    Args:
        student_logits: `(1, tokens, V)`, this rank's tokens under sequence parallelism.
        teacher_logprobs, teacher_ids: nested `(sequences, tokens, k)`, all ranks' tokens.

    Returns:
        A dict of `distillation_losses`, `student_mass` and `teacher_mass`, `(1, tokens)` each.
    """
    ulysses = importlib.import_module("verl.utils.ulysses")
    log_p, ids = (t.values().unsqueeze(0) for t in (teacher_logprobs, teacher_ids))
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        log_p, ids = (ulysses.slice_input_tensor(t, dim=1) for t in (log_p, ids))
    values = atesd_kernels.topk_divergence(student_logits, ids, log_p, **{**options, "reduction": "none"})
    with torch.no_grad():
        z = student_logits.gather(-1, ids).float()
        student_mass = (z - torch.logsumexp(student_logits.float(), -1, keepdim=True)).exp().sum(-1)
    return {"distillation_losses": values, "student_mass": student_mass, "teacher_mass": log_p.float().exp().sum(-1)}
