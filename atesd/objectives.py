"""Training objectives: functions of hidden states, heads and token ids that return a loss and its statistics.

The training loop knows no loss by name. An objective takes the hidden states of the response tokens and returns
`(loss, TokenStats)`. Every statistic that the run logs or the exposure policy reads comes from this call, so no
statistic needs another sweep over the vocabulary. `reward.py` computes GRPO's advantages.

| config.objective | loss, a mean over response tokens                          | responses          | teacher |
|------------------|-------------------------------------------------------------|--------------------|---------|
| `distill`        | divergence of the student from the teacher                  | student's rollouts | yes     |
| `sft`            | -log p_S(token)                                             | the references     | no      |
| `grpo`           | -advantage * log p_S(token), advantages from a verifier     | student's rollouts | no      |
| `distill+grpo`   | the first plus `reward_weight` times the third              | student's rollouts | yes     |
| `distill+sft`    | the first, plus `sft_weight` times `sft` on the references  | rollouts, and those | yes    |
| `policy_gradient`| -(log p_T - log p_S) * log p_S(token), advantage constant   | student's rollouts | yes     |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.config.doors import divergence_name
from atesd.config.mixture import STUDENT, views_of
from atesd.models.batching import to_device
from atesd.models.scoring import head_logprobs
from atesd.models.top_entries import TopEntries
from atesd.models.vocabulary import cut_to_known, over_same_entries
from atesd.parallel.processes import Processes
from atesd_kernels import TokenStats, linear_divergence, linear_topk_divergence
from atesd_kernels.integrations.backbone import AuxLoss
from atesd_kernels.integrations.head import HeadSpec

# Settings of a run that its divergence takes under the same names.
OF_CONFIG = "divergence beta scoring_temperature entry_clip token_clip chunk_bytes position_halflife".split()


@dataclass(frozen=True)
class ResponseTokens:
    """The `N` response tokens of a micro-batch, as input of an objective.

    Attributes:
        targets: `(N,)`, the tokens.
        lengths: number of tokens of each response; they sum to `N`.
        advantages: one for each response, if the objective needs a reward.
        weight: `(N,)` constant factor of each token's loss, such as the importance ratio of a rollout from another
            engine; None for 1.
        mean_length: tokens of a response of the step on average, where each response counts alike; None where each
            token does.
        sample_weights: constant factor of the loss of each response's tokens, its problem's weight; None for 1. It does
            not change the denominator.
    """

    targets: Tensor
    lengths: tuple[int, ...]
    advantages: tuple[float, ...] | None = None
    weight: Tensor | None = None
    mean_length: float | None = None
    sample_weights: tuple[float, ...] | None = None


class Objective(Protocol):
    """A loss on the response tokens of one micro-batch, divided by `num_tokens`, the number of tokens in the step.

    `config.loss_aggregation` is in the tokens' weights.

    Its sum over micro-batches (and processes) equals the loss of one large batch. The same holds for its gradients.

    Attributes:
        needs_teacher: whether it takes the teacher's hidden states.
        needs_rollouts: whether the responses are the student's own; if not, they are the reference solutions.
        needs_reward: whether it takes advantages.
    """

    needs_teacher: bool
    needs_rollouts: bool
    needs_reward: bool

    def __call__(
        self,
        student_hidden: Tensor,  # (N, hidden)
        student_head: HeadSpec,
        teacher_hidden: Tensor | list[Tensor] | TopEntries | None,  # (N, hidden), that of each view, or a server's
        teacher_head: HeadSpec | None,  # None: the student's
        tokens: ResponseTokens,
        num_tokens: int,
    ) -> tuple[Tensor, TokenStats]: ...


@dataclass(frozen=True)
class Divergence:
    """What a divergence from a teacher takes, however that is known.

    Attributes:
        divergence, beta, entry_clip, token_clip, chunk_bytes: as in `atesd_kernels.linear_divergence`.
        scoring_temperature: temperature of both distributions; no T^2 factor (OPSD).
        position_halflife: number of tokens after which a token's weight halves; see `position_weights`.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    scoring_temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None
    chunk_bytes: int | None = None
    position_halflife: float | None = None
    needs_teacher = needs_rollouts = True
    needs_reward = False

    def options(self, tokens: ResponseTokens, num_tokens: int) -> dict[str, Any]:
        """Returns the arguments that do not depend on teacher and head."""
        return {
            "divergence": self.divergence,
            "beta": self.beta,
            "entry_clip": self.entry_clip,
            "token_clip": self.token_clip,
            "chunk_bytes": self.chunk_bytes,
            "targets": tokens.targets,
            "token_weight": token_weight(tokens, self.position_halflife),
            "num_tokens": num_tokens,
            "return_stats": True,
        }


@dataclass(frozen=True)
class Distillation(Divergence):
    """Mean over response tokens of `D(teacher || student)`, between full next-token distributions.

    Attributes, beside those of `Divergence`:
        teacher_mix: weights of the views, if `teacher_hidden` is a list; see `teacher_views.py`.
        student_teaches: whether the last of them is the student's own, with the student's head.
    """

    teacher_mix: tuple[float, ...] | None = None
    student_teaches: bool = False

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        if teacher_head is not None:
            student_head, teacher_head = over_same_entries(student_head, teacher_head)
        options = student_head.divergence_options(self.scoring_temperature, teacher_head)
        options["teacher_weight"] = None if teacher_head is None else teacher_head.weight
        if self.teacher_mix is not None:
            options["teacher_mix"] = to_device(torch.tensor(self.teacher_mix), student_hidden.device)
        if self.student_teaches:
            heads = {"teacher_weight": None, "teacher_bias": student_head.bias}
            for name, own in heads.items():
                options[name] = [options[name]] * (len(teacher_hidden) - 1) + [own]
        options |= self.options(tokens, num_tokens)
        return linear_divergence(student_hidden, student_head.weight, teacher_hidden, **options)


@dataclass(frozen=True)
class TopkDistillation(Divergence):
    """`Distillation` from a teacher behind a server, which is known by its top entries.

    Attributes, beside those of `Divergence`:
        tail: what becomes of the other entries; see `atesd_kernels.linear_topk_divergence`.
    """

    tail: str = "bucket"

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        head = cut_to_known(student_head, teacher_hidden.known)
        options = head.logprob_options(self.scoring_temperature)
        return linear_topk_divergence(
            student_hidden,
            head.weight,
            teacher_hidden.ids,
            teacher_hidden.at(self.scoring_temperature),
            student_bias=options.pop("bias"),
            tail=self.tail,
            **options,
            **self.options(tokens, num_tokens),
        )


@dataclass(frozen=True)
class SupervisedFineTuning:
    """`weight` times the mean over the tokens of the reference solutions of `-log p_S(token)`, at temperature 1."""

    chunk_bytes: int | None = None
    weight: float = 1.0
    needs_rollouts = needs_teacher = needs_reward = False

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        logprobs, stats = head_logprobs(student_hidden, student_head, tokens.targets, 1.0, self.chunk_bytes)
        return -self.weight * weighted_sum(logprobs, token_weight(tokens)) / num_tokens, stats


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO (arXiv 2402.03300) with one update per batch of rollouts; a mean over all response tokens.

        loss = -1/num_tokens sum_n w_n A_n exp(log p_n - [log p_n])        [.] carries no gradient

    With one update the ratio of the new to the old policy is 1. So its clip never applies, and the loss equals
    -mean(w A), which does not fall with training. The mean over all tokens of the step follows DAPO (arXiv 2503.14476).
    GRPO's own, within each response first, is `loss_aggregation: sequence`. There is no KL term to a reference;
    `distill+grpo` distils the teacher instead.

    Attributes:
        temperature: temperature of the log-probabilities; the rollouts' sampling temperature.
    """

    temperature: float = 1.0
    chunk_bytes: int | None = None
    needs_rollouts = needs_reward = True
    needs_teacher = False

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        logprobs, stats = head_logprobs(
            student_hidden, student_head, tokens.targets, self.temperature, self.chunk_bytes
        )
        repeated = of_each_token(tokens.advantages, tokens.lengths)
        advantages = to_device(repeated.to(logprobs.dtype), logprobs.device)
        ratio = torch.exp(logprobs - logprobs.detach())
        return -weighted_sum(advantages * ratio, token_weight(tokens)) / num_tokens, stats


@dataclass(frozen=True)
class TeacherAdvantage:
    """On-policy distillation by the sampled tokens alone, as a policy gradient.

        A_n  = log p_T(y_n) - log p_S(y_n)                                  no gradient
        loss = -1/num_tokens sum_n w_n A_n exp(log p_S(y_n) - [log p_S(y_n)])

    Its expected gradient over tokens drawn from p_S is that of the reverse KL of the token (Lu et al., "On-Policy
    Distillation", 2025). One number a token is all it needs of the teacher; it is noisier than a divergence. The
    statistics' divergence is the sampled one, -A_n, which may be negative; agreement of the top tokens is unknown.

    Attributes:
        scoring_temperature: temperature of both log-probabilities.
    """

    scoring_temperature: float = 1.0
    chunk_bytes: int | None = None
    needs_teacher = needs_rollouts = True
    needs_reward = False

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        served = teacher_hidden if isinstance(teacher_hidden, TopEntries) else None
        if served is not None:
            student_head = cut_to_known(student_head, served.known)
        elif teacher_head is not None:
            student_head, teacher_head = over_same_entries(student_head, teacher_head)
        rest = (tokens.targets, self.scoring_temperature, self.chunk_bytes)
        logprobs, stats = head_logprobs(student_hidden, student_head, *rest)
        if served is not None:
            taught, entropy = served.of_targets.to(logprobs.dtype), served.entropy().to(logprobs.dtype)
        else:
            with torch.no_grad():
                taught, of_teacher = head_logprobs(teacher_hidden, teacher_head or student_head, *rest)
            entropy = of_teacher.student_entropy
        advantages = taught - logprobs.detach()
        ratio = torch.exp(logprobs - logprobs.detach())
        stats = stats._replace(
            divergence=-advantages,
            teacher_entropy=entropy,
            teacher_logprob=taught,
        )
        return -weighted_sum(advantages * ratio, token_weight(tokens)) / num_tokens, stats


@dataclass(frozen=True)
class Mixed:
    """`distillation + reward_weight * policy_gradient`, with the distillation's statistics.

    It sweeps the student's head twice, because the log-probabilities of the first term carry no gradient.
    """

    distillation: Distillation | TopkDistillation
    policy_gradient: PolicyGradient
    reward_weight: float = 1.0
    needs_teacher = needs_rollouts = needs_reward = True

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        states = (student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens)
        divergence, stats = self.distillation(*states)
        reward, _ = self.policy_gradient(*states)
        return divergence + self.reward_weight * reward, stats


def mixture_of(config: ATESDConfig) -> dict[str, Any]:
    """Returns the arguments of `Distillation` for `config.teacher_views`."""
    names, weights = views_of(config)
    return {"teacher_mix": weights if len(names) > 1 else None, "student_teaches": STUDENT in names}


def make_distillation(config: ATESDConfig, **settings: Any) -> Distillation | TopkDistillation:
    """Returns the divergence from the teacher of `config`, with `settings` and else the defaults."""
    if config.teacher == "vllm_server":
        return TopkDistillation(tail=config.teacher_tail, **settings)
    return Distillation(**settings, **mixture_of(config))


def make_objective(config: ATESDConfig) -> Objective:
    """The objective `config.objective` names. A divergence `module:object` is registered here."""
    settings = {name: getattr(config, name) for name in OF_CONFIG}
    distillation = make_distillation(config, **settings | {"divergence": divergence_name(config.divergence)})
    policy_gradient = PolicyGradient(temperature=config.temperature, chunk_bytes=config.chunk_bytes)
    return {
        "distill": distillation,
        "sft": SupervisedFineTuning(chunk_bytes=config.chunk_bytes),
        "grpo": policy_gradient,
        "distill+grpo": Mixed(distillation, policy_gradient, config.reward_weight),
        "policy_gradient": TeacherAdvantage(config.scoring_temperature, config.chunk_bytes),
        "distill+sft": distillation,  # `make_imitation` has the other term
    }[config.objective]


def make_imitation(config: ATESDConfig) -> SupervisedFineTuning | None:
    """Returns the term on the references beside the objective on the responses, if there is one."""
    return SupervisedFineTuning(config.chunk_bytes, config.sft_weight) if config.objective == "distill+sft" else None


def position_weights(lengths: tuple[int, ...], halflife: float) -> Tensor:
    """Returns `(N,)` float64; token n of T in a response has `2^(-n/halflife) * T / sum_m 2^(-m/halflife)`.

    Early tokens decide the course of a solution; at late tokens student and teacher have diverged. The mean within
    each response is 1 (our choice), so a response's share of the loss does not change.
    """
    parts = [torch.exp2(-torch.arange(n, dtype=torch.float64) / halflife) for n in lengths]
    return torch.cat([part * (len(part) / part.sum()) for part in parts])


def token_weight(tokens: ResponseTokens, halflife: float | None = None) -> Tensor | None:
    """Returns the factor of each token's loss, `(N,)`: `tokens.weight` times that of its position, of its response and
    of its problem; None if all are 1."""
    parts = [] if halflife is None else [position_weights(tokens.lengths, halflife)]
    if tokens.mean_length is not None:
        parts.append(response_weights(tokens.lengths, tokens.mean_length))
    if tokens.sample_weights is not None:
        parts.append(of_each_token(tokens.sample_weights, tokens.lengths))
    weights = [to_device(part, tokens.targets.device) for part in parts]
    if tokens.weight is not None:
        weights.append(tokens.weight)
    return math.prod(weights[1:], start=weights[0]) if weights else None


def response_weights(lengths: tuple[int, ...], mean_length: float) -> Tensor:
    """Returns `(N,)` float64, `mean_length / T` for each of the T tokens of a response.

    A sum with these weights, over the number of tokens, is the mean over responses of the mean over their tokens.
    """
    return torch.cat([torch.full((n,), mean_length / max(n, 1), dtype=torch.float64) for n in lengths])


def of_each_token(values: tuple[float, ...], lengths: tuple[int, ...]) -> Tensor:
    """Returns `(N,)` float64: each response's value for each of its tokens."""
    return torch.tensor([v for v, n in zip(values, lengths, strict=True) for _ in range(n)], dtype=torch.float64)


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.sum() if weight is None else (values * weight.to(values.dtype)).sum()


class TokenTotals:
    """Sums `TokenStats` over the micro-batches of a step. The sums stay on the device until they are read."""

    NAMES = ("mismatch", "top1_agreement", "student_entropy", "teacher_entropy", "student_confidence")
    WITHOUT_TEACHER = ("student_entropy", "student_confidence")

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.divergences: list[Tensor] = []
        self.imitation: list[Tensor] = []  # of each micro-batch: its share of the references' term
        self.aux_losses: list[Tensor] = []  # of each micro-batch: its share of the auxiliary loss, and that weighted
        self.has_teacher = self.has_agreement = True

    def add(self, stats: TokenStats) -> None:
        self.has_teacher, self.has_agreement = stats.teacher_entropy is not None, stats.top1_agree is not None
        columns = (
            stats.divergence,
            stats.top1_agree,
            stats.student_entropy,
            stats.teacher_entropy,
            stats.student_top1_prob,
        )
        absent = torch.zeros_like(stats.student_entropy)
        known = (absent if column is None else column for column in columns)
        self.sums.append(torch.stack([column.double().sum() for column in known]))
        self.divergences.append(stats.divergence)

    def add_aux_loss(self, aux: AuxLoss, share: float) -> Tensor:
        """Adds a micro-batch's `share` of the experts' auxiliary loss. Returns it with the model's coefficient."""
        weighted = aux.weighted(share)
        self.aux_losses.append(torch.stack([aux.value.detach().double() * share, weighted.detach().double()]))
        return weighted

    def aux_loss(self) -> tuple[float, float] | None:
        """Returns the step's auxiliary loss without and with its coefficient; None for a model that has none."""
        if not self.aux_losses:
            return None
        value, weighted = torch.stack(self.aux_losses).sum(0).tolist()
        return value, weighted

    def imitation_loss(self) -> float:
        """Returns the step's term on the references, 0 without one."""
        return float(torch.stack(self.imitation).sum()) if self.imitation else 0.0

    def objective(self, loss: float) -> float:
        """Returns the step's `loss` without the parts that are not due to the teacher: the weighted auxiliary loss and
        the references' term."""
        aux_loss = self.aux_loss()
        return loss - self.imitation_loss() - (0.0 if aux_loss is None else aux_loss[1])

    def sum(self) -> Tensor:
        """Returns the sums, `(5,)` float64, in the order of `NAMES`."""
        return torch.stack(self.sums).sum(0)

    def over(self, processes: Processes) -> None:
        """All-reduces the sums and gathers the divergences, in place, over all processes."""
        self.sums = [processes.all_reduce(self.sum())]
        self.divergences = [processes.gather(torch.cat(self.divergences))]
        if self.imitation:
            self.imitation = [processes.all_reduce(torch.stack(self.imitation).sum())]
        if self.aux_losses:
            self.aux_losses = [processes.all_reduce(torch.stack(self.aux_losses).sum(0))]

    def means(self, num_tokens: int) -> dict[str, float]:
        """Returns the metrics of a step; without a teacher, only those that need none."""
        means = dict(zip(self.NAMES, (self.sum() / num_tokens).tolist(), strict=True))
        if not self.has_teacher:
            return {name: means[name] for name in self.WITHOUT_TEACHER}
        if not self.has_agreement:
            del means["top1_agreement"]
        return means | {"mismatch_p95": self.p95()}

    def p95(self) -> float:
        """Returns the 95th percentile of the token divergences before clips."""
        return percentile(torch.cat(self.divergences), 0.95)

    def share_above(self, bound: float) -> float:
        """Returns the share of tokens whose divergence exceeds `bound`."""
        return float((torch.cat(self.divergences) > bound).double().mean())


def percentile(values: Tensor, share: float) -> float:
    """Returns the value below which `share` of `values` lie, rounded down to an element of `values`; NaN for none."""
    if not len(values):
        return math.nan
    return float(values.float().sort().values[int(share * (len(values) - 1))])
