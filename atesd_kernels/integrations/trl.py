"""Computes the loss of TRL's distillation trainers from hidden states: one call, before `train()`.

Teacher and student stop at their hidden states, and one `linear_divergence` processes the micro-batch, so neither
materialises `[batch, tokens, vocab]`. Everything around the loss (rollouts, prompts, teachers, logging) stays TRL's.
Only methods of the given trainer object are replaced.

TRL's trainers change from release to release, and a loss in the wrong place would train on something else. So we check
the source of every function that this file replaces or relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import linear_divergence, linear_logprobs, linear_topk_divergence
from .backbone import AuxLoss, as_output, aux_loss_of, backbone_forward, wants_aux_loss
from .head import HeadSpec, hidden_states_and_head, unwrap
from .source import is_as_expected, with_globals
from .wrappers import through

WRITTEN_FOR = "1.16.0"

# Functions that are replaced, called or relied on, with the fingerprints of their source in that release.
_SHARED = {
    "_compute_self_distillation_loss": "ac3576c4a516",
    "_forward_logits": "1fd940095a8e",
    "_compute_rollout_logps": "0221c1ae9e97",
    "_get_teacher_context_for_self_distillation": "1a50751db8d3",
    "compute_full_logit_self_distillation_loss": "be8fd9a226c9",
    "compute_sampled_token_self_distillation_loss": "9ff71258c1df",
    "compute_divergence": "04634705e254",
    "apply_importance_sampling_clipping": "44f4f8666a67",
    "_get_teacher_token_logprobs_from_server": "46ab97aa2262",
}
_SDFT = {**_SHARED, "compute_loss": "8c2b37b2d1bf", "_compute_teacher_student_logits": "a154ca4ea177"}
_SDFT["_compute_server_distillation_loss"] = "856ee976868a"
_SDPO = {**_SHARED, "compute_loss": "40280c708898", "_compute_teacher_student_logits": "23bfa0111fbf"}
_SDPO["_compute_policy_loss"] = "f798adf7624c"
_SDPO["_compute_server_distillation_loss"] = "5f1a5dc2034c"
_GKD = {"compute_loss": "194af1daab68", "generalized_jsd_loss": "dec87ad008c3"}
_DISTILLATION = {
    "compute_loss": "005dea3d3d5a",
    "_compute_loss": "02fe325c15ff",
    "_get_last_hidden_state": "11b7dcc3bbeb",
    "_chunked_divergence_loss": "f201f48d6d0a",
}


def use_linear_divergence(
    trainer: Any,
    *,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    strict: bool = True,
) -> bool:
    """Makes a TRL trainer compute its loss with `linear_divergence`. Call it after the constructor, before `train()`.

    The loss is the trainer's own, with its `distillation_alpha` / `beta`, temperature, masks, importance weights and
    reduction. It is equal in fp32, and more accurate in bf16 if teacher and student share their head (LoRA with the
    frozen base as teacher). GKD's loss always ignores `args.temperature`. SDFT and SDPO also log entropies, top-1
    agreement and the student's confidence under `self_distillation/`; they log `distillation_loss` before clips. With a
    teacher on a server (`use_teacher_server=True`) and `distillation_mode="topk_logits"` their loss is
    `linear_topk_divergence`: `tail="bucket"` with `distillation_add_tail`, else "renormalise". A mixture of experts
    whose configuration asks for its auxiliary loss (`output_router_logits`) gets it added, with the model's own
    coefficient, and logged without it as `aux_loss`; TRL's own distillation losses leave it out.

    Args:
        trainer: an `SDFTTrainer`, `SDPOTrainer`, `GKDTrainer` or `DistillationTrainer`, or a subclass; but not TRL's
            `ServerDistillationTrainer`, which has a loss of its own.
        entry_clip, token_clip, backend, chunk_bytes: as for `linear_divergence`.
        strict: raise if the installed TRL (or the subclass) has other source than this adapter was written for. False
            warns instead and leaves the trainer unchanged, so that it trains with TRL's own loss.

    Returns:
        True if the loss was replaced, False if not (`strict=False` only).

    Raises:
        UnexpectedSourceError: a `RuntimeError` that names both versions and the differing functions; see `strict`.
        ValueError: for another trainer, top-k distillation from a local teacher, a head that is not linear, or sharded
            parameters (FSDP, DeepSpeed; `DistillationTrainer` gathers its heads itself).

    Example:
        >>> from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # doctest: +SKIP
        >>> trainer = SDFTTrainer(model, SDFTConfig(distillation_mode="full_logits"), dataset)  # doctest: +SKIP
        >>> use_linear_divergence(trainer, entry_clip=0.05)  # doctest: +SKIP
        True
    """
    adapters = {
        "SDFTTrainer": (_SDFT, _patch_self_distillation),
        "SDPOTrainer": (_SDPO, _patch_self_distillation),
        "GKDTrainer": (_GKD, _patch_gkd),
        "DistillationTrainer": (_DISTILLATION, _patch_distillation),
    }
    names = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    name = next((n for n in names if n in adapters), None)
    if "ServerDistillationTrainer" in names:  # a DistillationTrainer, whose compute_loss it overrides
        raise ValueError(
            f"{type(trainer).__name__} is a ServerDistillationTrainer, whose loss of a server's top entries is not "
            "replaced. Use an SDFTTrainer or SDPOTrainer with use_teacher_server=True and "
            "distillation_mode='topk_logits', where the student's server teaches; for a server of another model call "
            "linear_topk_divergence yourself, or train with `atesd` and teacher: vllm_server."
        )
    if name is None:
        raise ValueError(f"{type(trainer).__name__} is none of TRL's {', '.join(adapters)}; pass one of these.")
    expected, patch = adapters[name]
    if not is_as_expected(type(trainer), name, expected, "trl", WRITTEN_FOR, strict):
        return False
    clips = {"entry_clip": entry_clip, "token_clip": token_clip}
    patch(trainer, clips, {"backend": backend, "chunk_bytes": chunk_bytes})
    _generate_without_aux_loss(unwrap(trainer.model))
    return True


def _generate_without_aux_loss(base: Any) -> None:
    """Switches the auxiliary loss off while `base` generates: its mask does not fit one new token after a cache."""
    if wants_aux_loss(base):
        base.generate = partial(base.generate, output_router_logits=False)


class Hidden(NamedTuple):
    """Replaces TRL's logits: hidden states, and the head that maps them to logits."""

    states: Tensor  # [B, T, H]
    head: HeadSpec
    aux: AuxLoss | None = None


def hidden_states(trainer: Any, model: nn.Module, **inputs: Tensor) -> Hidden:
    """Runs the backbone of `model` in the trainer's precision. Returns its last hidden states `[B, L, H]` and head."""
    backbone, head = hidden_states_and_head(model)
    with trainer.accelerator.autocast():
        output = backbone(use_cache=False, **inputs)
    return Hidden(output.last_hidden_state, head, aux_loss_of(output))


def _share_of_batch(trainer: Any) -> float:
    """Returns the share of a batch in an optimizer step, in which all batches count equally."""
    return 1 / trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0


def _log_aux_loss(trainer: Any, aux: AuxLoss) -> None:
    mean = trainer.accelerator.gather(aux.value.detach()).mean()
    trainer._metrics["train" if trainer.model.training else "eval"]["aux_loss"].append(float(mean))


def _require_unsharded_heads(trainer: Any) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"{type(trainer).__name__} shards its parameters (FSDP or DeepSpeed), so its head is not available outside "
            "the forward pass. Use DDP, or train with `atesd`."
        )
    for model in (trainer.model, trainer.teacher_model):
        hidden_states_and_head(model)


# SDFT and SDPO


def _patch_self_distillation(trainer: Any, clips: dict[str, Any], options: dict[str, Any]) -> None:
    args = trainer.args
    if args.distillation_mode == "topk_logits" and not trainer.use_teacher_server:
        raise ValueError(
            "distillation_mode='topk_logits' with a local teacher: a top-k loss is not a divergence of full "
            "distributions. Set distillation_mode='full_logits', which here needs no more memory, or 'sampled_token'."
        )
    if args.distillation_mode == "sampled_token" and any(clip is not None for clip in clips.values()):
        raise ValueError("entry_clip and token_clip need a divergence; distillation_mode='sampled_token' has none.")
    _require_unsharded_heads(trainer)

    def logprobs(hidden: Hidden, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = hidden.head.logprob_options(trainer.temperature)
        with trainer.accelerator.autocast():
            return linear_logprobs(hidden.states, hidden.head.weight, ids, mask=mask, **temperature, **options)

    aux_losses: list[AuxLoss] = []
    trainer._forward_logits = partial(_forward_hidden, trainer, aux_losses)
    trainer.compute_loss = partial(_loss_with_aux, trainer, trainer.compute_loss, aux_losses)
    trainer._compute_self_distillation_loss = partial(_self_distillation_loss, trainer, logprobs, clips | options)
    scoring = ["_compute_rollout_logps", "_compute_policy_loss"]
    if args.distillation_mode == "topk_logits":
        trainer._compute_server_distillation_loss = partial(_server_topk_loss, trainer, logprobs, clips | options)
    else:
        scoring.append("_compute_server_distillation_loss")
    for method in scoring:
        if hasattr(trainer, method):
            setattr(trainer, method, with_globals(trainer, method, selective_log_softmax=logprobs))


def _forward_hidden(
    trainer: Any,
    aux_losses: list[AuxLoss],
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
) -> Hidden:
    """Returns the hidden states `[B, logits_to_keep, H]` that predict the last `logits_to_keep` tokens.

    Appends the forward's auxiliary loss to `aux_losses`.
    """
    states, head, aux = hidden_states(trainer, model, input_ids=input_ids, attention_mask=attention_mask)
    if aux is not None:
        aux_losses.append(aux)
    return Hidden(states[:, -logits_to_keep - 1 : -1], head, aux)


@contextmanager
def _logged(trainer: Any, aux_losses: list[AuxLoss]) -> Iterator[None]:
    """Logs the auxiliary losses that the forwards within put into `aux_losses`."""
    aux_losses.clear()
    yield
    for aux in aux_losses:
        _log_aux_loss(trainer, aux)
    aux_losses.clear()  # it would keep the graph


def _loss_with_aux(
    trainer: Any, compute_loss: Callable[..., Tensor], aux_losses: list[AuxLoss], *args: Any, **kwargs: Any
) -> Tensor:
    """Adds the student's auxiliary loss to TRL's `compute_loss`, whose forwards put it into `aux_losses`."""
    with _logged(trainer, aux_losses):
        loss = compute_loss(*args, **kwargs)
        for aux in aux_losses:
            loss = loss + aux.weighted(_share_of_batch(trainer))
    return loss


def _self_distillation_loss(
    trainer: Any, logprobs: Callable, options: dict[str, Any], model: nn.Module, inputs: dict[str, Any], pair: Any
) -> Tensor:
    """Replaces TRL's `_compute_self_distillation_loss`: a mean over each sequence's tokens, then over the batch.

    Token weights express the mean over tokens, so that the forward pass can compute the gradient. A batch without
    tokens has zero weights and gives a zero loss that is attached to the graph.
    """
    args, ids, mask = trainer.args, pair.completion_ids, pair.loss_mask
    student, teacher = pair.student_logits, pair.teacher_logits
    counted = mask.bool()
    ratio = _importance_ratio(trainer, logprobs, inputs, student, ids, mask)
    weight = _token_weight(mask, ratio)
    metrics: dict[str, Any] = {}
    if args.distillation_mode == "sampled_token":
        own = logprobs(student, ids, counted)
        with torch.no_grad():
            log_ratio = own - logprobs(teacher, ids, counted)
        loss = (log_ratio * own * weight).sum()
        per_token = log_ratio * own.detach()
    else:
        with trainer.accelerator.autocast():
            loss, stats = linear_divergence(
                student.states,
                student.head.weight,
                teacher.states,
                teacher.head.weight,
                divergence="jsd",
                beta=args.distillation_alpha,
                mask=counted,
                token_weight=weight,
                reduction="sum",
                return_stats=True,
                **student.head.divergence_options(trainer.temperature, teacher.head),
                **options,
            )
        per_token = stats.divergence
        metrics = {
            "student_entropy": stats.student_entropy,
            "teacher_entropy": stats.teacher_entropy,
            "student_confidence": stats.student_top1_prob,
            "top1_agreement": stats.top1_agree,
        }
    _log_distillation(trainer, model, per_token * ratio, counted, metrics)
    return loss


def _importance_ratio(
    trainer: Any, logprobs: Callable, inputs: dict[str, Any], student: Hidden, ids: Tensor, mask: Tensor
) -> Tensor:
    """Returns TRL's clipped importance weight of each token, `[B, T]`; ones if it uses none."""
    ratio = torch.ones_like(mask, dtype=torch.float32)
    old, bound = inputs.get("old_per_token_logps"), trainer.args.distillation_is_clip
    if bound is None or old is None:
        return ratio
    clip = type(trainer)._compute_self_distillation_loss.__globals__["apply_importance_sampling_clipping"]
    with torch.no_grad():
        return clip(ratio, logprobs(student, ids, mask.bool()), old, bound)


def _token_weight(mask: Tensor, ratio: Tensor) -> Tensor:
    """Returns the factors `[B, T]` of TRL's mean over tokens, then sequences: sum_b (1/B) sum_t mask D / T_b."""
    return mask * ratio / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)


def _log_distillation(
    trainer: Any, model: nn.Module, per_token: Tensor, counted: Tensor, metrics: dict[str, Any]
) -> None:
    """Logs the mean over counted tokens of the loss and of `metrics`, over all processes."""
    values = torch.stack([per_token, *metrics.values()]).float()
    means = (values * counted).sum((1, 2)) / counted.sum().clamp(min=1)
    logged = trainer.accelerator.gather(means[None]).mean(0).tolist()
    mode = "train" if model.training else "eval"
    trainer._log_self_distillation_metric(mode, logged[0])
    for name, value in zip(metrics, logged[1:], strict=True):
        trainer._metrics[mode][f"self_distillation/{name}"].append(value)


def _server_topk_loss(
    trainer: Any, logprobs: Callable, options: dict[str, Any], model: nn.Module, inputs: dict[str, Any]
) -> Tensor:
    """Replaces TRL's `_compute_server_distillation_loss` of the teacher's top-k entries."""
    if trainer.state.global_step != trainer._last_loaded_step:  # as TRL: the server's weights may be stale
        trainer.vllm_generation.sync_weights()
        trainer.accelerator.wait_for_everyone()
        trainer._last_loaded_step = trainer.state.global_step
    ids, mask = inputs["completion_ids"], _server_loss_mask(trainer, inputs)
    student = trainer._forward_logits(
        model=model,
        input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        logits_to_keep=ids.shape[1],
    )
    teacher = trainer._get_teacher_token_logprobs_from_server(inputs, ids.shape[1])
    counted, scored = mask.bool(), teacher["actual_logprobs"]
    if (counted & ~torch.isfinite(scored)).any():
        raise ValueError("Teacher server returned no logprob for a required completion token.")
    ratio = _importance_ratio(trainer, logprobs, inputs, student, ids, mask)
    head = student.head.logprob_options(trainer.temperature)
    with trainer.accelerator.autocast():
        loss, stats = linear_topk_divergence(
            student.states,
            student.head.weight,
            teacher["topk_token_ids"],
            teacher["topk_logprobs"],
            divergence="jsd",
            beta=trainer.args.distillation_alpha,
            tail="bucket" if trainer.args.distillation_add_tail else "renormalise",
            targets=ids,
            mask=counted,
            token_weight=_token_weight(mask, ratio),
            reduction="sum",
            return_stats=True,
            temperature=head["temperature"],
            softcap=head["softcap"],
            student_bias=head["bias"],
            **options,
        )
    metrics = {
        "server_logprob_abs_diff": torch.where(counted, stats.student_logprob - scored, 0.0).abs(),
        "student_entropy": stats.student_entropy,
        "teacher_entropy": stats.teacher_entropy,
        "student_confidence": stats.student_top1_prob,
        "top1_agreement": stats.top1_agree,
    }
    _log_distillation(trainer, model, stats.divergence * ratio, counted, metrics)
    return loss


def _server_loss_mask(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns the mask of TRL's loss against a server, `[B, T]`: SDFT skips first tokens, SDPO whole sequences."""
    mask = inputs["completion_mask"]
    if skipped := getattr(trainer, "num_loss_tokens_to_skip", 0):
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)
    shown = inputs.get("self_distillation_mask")
    return mask if shown is None else mask * shown[:, None]


# GKD


def _patch_gkd(trainer: Any, clips: dict[str, Any], options: dict[str, Any]) -> None:
    _require_unsharded_heads(trainer)
    dense = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # an evaluation that needs logits
            return dense(model, inputs, True, num_items_in_batch)
        trainer.teacher_model.eval()
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student = hidden_states(trainer, model, **tokens)
        with torch.no_grad():
            teacher = hidden_states(trainer, trainer.teacher_model, **tokens)
        mask = inputs["labels"][:, 1:] != -100
        with trainer.accelerator.autocast():
            loss = linear_divergence(
                student.states[:, :-1],
                student.head.weight,
                teacher.states[:, :-1],
                teacher.head.weight,
                divergence="jsd",
                beta=trainer.beta,
                mask=mask,
                num_tokens=num_items_in_batch,
                **student.head.divergence_options(1.0, teacher.head),
                **clips,
                **options,
            )
        if student.aux is not None:
            # not by tokens: `num_items_in_batch` does not count generated responses
            share = 1.0 if num_items_in_batch is None else _share_of_batch(trainer)
            loss = loss + student.aux.weighted(share)
            _log_aux_loss(trainer, student.aux)
        return loss

    trainer.compute_loss = compute_loss


def _share(mask: Tensor, num_tokens: Any) -> float | Tensor:
    """Returns the share of a batch in `num_tokens`, the tokens of an optimizer step."""
    return 1.0 if num_tokens is None else mask.sum() / num_tokens


# DistillationTrainer, which has its own chunked loss


def _patch_distillation(trainer: Any, clips: dict[str, Any], options: dict[str, Any]) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    measured: dict[str, HeadSpec] = {}
    if not sharded:  # sharded heads are read as TRL reads them
        for side, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
            measured[side] = hidden_states_and_head(model)[1]
    aux_losses: list[AuxLoss] = []

    def head_of(side: str, weight: Tensor, given: dict[str, Any]) -> HeadSpec:
        softcap, scale = given[f"{side}_final_logit_softcapping"] or None, given[f"{side}_logit_scale"]
        if side in measured:
            softcap, scale = measured[side].softcap, measured[side].scale
        return HeadSpec(_full_tensor(weight), _full_tensor(given[f"{side}_lm_head_bias"]), softcap, scale)

    def loss_of_hidden_states(
        student_states,
        teacher_states,
        student_weight,
        teacher_weight,
        completion_mask,
        beta,
        num_items_in_batch=None,
        temperature=1.0,
        **given,
    ):
        student, teacher = head_of("student", student_weight, given), head_of("teacher", teacher_weight, given)
        mask = completion_mask != 0
        with trainer.accelerator.autocast():
            loss, stats = linear_divergence(
                student_states,
                student.weight,
                teacher_states,
                teacher.weight,
                divergence="jsd",
                beta=beta,
                mask=mask,
                num_tokens=num_items_in_batch,
                return_stats=True,
                **student.divergence_options(temperature, teacher),
                **clips,
                **options,
            )
        for aux in aux_losses:
            loss = loss + aux.weighted(_share(mask, num_items_in_batch))
        return loss, stats.student_entropy.sum(), mask.sum()

    trainer._get_last_hidden_state = partial(_last_hidden_state, trainer, trainer._get_last_hidden_state, aux_losses)
    trainer._compute_loss = with_globals(trainer, "_compute_loss", _chunked_divergence_loss=loss_of_hidden_states)
    trainer.compute_loss = partial(_loss_with_logged_aux, trainer, trainer.compute_loss, aux_losses)


def _last_hidden_state(
    trainer: Any, own: Callable[..., Tensor], aux_losses: list[AuxLoss], model: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Runs TRL's `_get_last_hidden_state` with what the backbone's forward alone would skip (see `backbone`)."""
    base = unwrap(model)
    backbone, forward = base.base_model, backbone_forward(model)
    if forward is backbone:
        return own(model, *args, **kwargs)

    def noted(*_: Any, **inputs: Any) -> Any:
        output = as_output(forward(**{name: value for name, value in inputs.items() if name != "logits_to_keep"}))
        if (aux := aux_loss_of(output)) is not None:
            aux_losses.append(aux)
        return output

    return through(partial(own, model, *args), backbone, noted, **kwargs)


def _loss_with_logged_aux(
    trainer: Any, compute_loss: Callable[..., Any], aux_losses: list[AuxLoss], *args: Any, **kwargs: Any
) -> Any:
    with _logged(trainer, aux_losses):
        return compute_loss(*args, **kwargs)


def _full_tensor(tensor: Any) -> Any:
    """Gathers a sharded (DTensor) parameter. FSDP2 shards the head like any other parameter."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
