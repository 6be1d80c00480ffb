"""What the student is trained on, and what is measured with it: functions of hidden states, heads and token ids.

Separate from the trainer so that the loop does not know a loss by name. An objective gets the hidden states of the
response tokens and gives `(loss, TokenStats)`; every statistic the run logs or the exposure policy reads comes from
that call, so nothing goes over the vocabulary twice for a statistic. `reward.py` has the advantages GRPO needs.

| config.objective | loss, a mean over response tokens                          | responses          | teacher |
|------------------|-------------------------------------------------------------|--------------------|---------|
| `distill`        | divergence of the student from the teacher                  | student's rollouts | yes     |
| `sft`            | -log p_S(token)                                             | the references     | no      |
| `grpo`           | -advantage * log p_S(token), advantages from a verifier     | student's rollouts | no      |
| `distill+grpo`   | the first plus `reward_weight` times the third              | student's rollouts | yes     |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from atesd.config import ATESDConfig
from atesd.models.batching import PackedBatch, hidden_rows, to_device
from atesd.parallel.processes import Processes
from atesd_kernels import TokenStats, linear_divergence, linear_logprobs
from atesd_kernels.integrations.head import HeadSpec


@dataclass(frozen=True)
class ResponseTokens:
    """The `N` response tokens of a micro-batch, as an objective sees them.

    Attributes:
        targets: `(N,)`, the tokens.
        lengths: tokens of each response; they sum to `N`.
        advantages: one for each response, where the objective needs a reward.
        weight: `(N,)` constant factor of each token's loss, such as the importance ratio of a rollout that another
            engine sampled; None for 1.
    """

    targets: Tensor
    lengths: tuple[int, ...]
    advantages: tuple[float, ...] | None = None
    weight: Tensor | None = None


class Objective(Protocol):
    """A loss on the response tokens of one micro-batch, already divided by `num_tokens`, the tokens of the whole step.

    Summed over micro-batches (and processes) it equals the loss of one large batch, and so do its gradients.

    Attributes:
        needs_teacher: whether it is given the teacher's hidden states.
        needs_rollouts: whether the responses are the student's own; if not, they are the reference solutions.
        needs_reward: whether it is given advantages.
    """

    needs_teacher: bool
    needs_rollouts: bool
    needs_reward: bool

    def __call__(
        self,
        student_hidden: Tensor,  # (N, hidden)
        student_head: HeadSpec,
        teacher_hidden: Tensor | None,  # (N, hidden)
        teacher_head: HeadSpec | None,  # None: the student's
        tokens: ResponseTokens,
        num_tokens: int,
    ) -> tuple[Tensor, TokenStats]: ...


@dataclass(frozen=True)
class Distillation:
    """Mean over response tokens of `D(teacher || student)`, the whole next-token distributions compared.

    Attributes:
        divergence, beta, entry_clip, token_clip, chunk_bytes: as in `atesd_kernels.linear_divergence`.
        scoring_temperature: of both distributions; no T^2 factor (OPSD).
        position_halflife: tokens after which a token of a response counts half as much; see `position_weights`.
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

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        return linear_divergence(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            None if teacher_head is None else teacher_head.weight,
            **student_head.divergence_options(self.scoring_temperature, teacher_head),
            divergence=self.divergence,
            beta=self.beta,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            chunk_bytes=self.chunk_bytes,
            targets=tokens.targets,
            token_weight=token_weight(tokens, self.position_halflife),
            num_tokens=num_tokens,
            return_stats=True,
        )


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Mean over the tokens of the reference solutions of `-log p_S(token)`, at temperature 1."""

    chunk_bytes: int | None = None
    needs_rollouts = needs_teacher = needs_reward = False

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        logprobs, stats = head_logprobs(student_hidden, student_head, tokens.targets, 1.0, self.chunk_bytes)
        return -weighted_sum(logprobs, token_weight(tokens)) / num_tokens, stats


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO (arXiv 2402.03300) with one update for each batch of rollouts, a mean over all response tokens.

        loss = -1/num_tokens sum_n w_n A_n exp(log p_n - [log p_n])        [.] carries no gradient

    With one update the ratio of the new to the old policy is 1, so its clip never acts, and the loss's value is
    -mean(w A), not something that falls. The mean over all tokens of the step (rather than within each response first)
    is DAPO's (arXiv 2503.14476). There is no KL term to a reference: `distill+grpo` pulls towards the teacher instead.

    Attributes:
        temperature: the rollouts' sampling temperature, at which log-probabilities are taken.
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
        repeated = [a for a, n in zip(tokens.advantages, tokens.lengths, strict=True) for _ in range(n)]
        advantages = to_device(torch.tensor(repeated, dtype=logprobs.dtype), logprobs.device)
        ratio = torch.exp(logprobs - logprobs.detach())
        return -weighted_sum(advantages * ratio, token_weight(tokens)) / num_tokens, stats


@dataclass(frozen=True)
class Mixed:
    """`distillation + reward_weight * policy_gradient`; the statistics are the distillation's.

    The student's head is gone over twice, for the log-probabilities the first term reports carry no gradient.
    """

    distillation: Distillation
    policy_gradient: PolicyGradient
    reward_weight: float = 1.0
    needs_teacher = needs_rollouts = needs_reward = True

    def __call__(self, student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens):
        """See `Objective`."""
        states = (student_hidden, student_head, teacher_hidden, teacher_head, tokens, num_tokens)
        divergence, stats = self.distillation(*states)
        reward, _ = self.policy_gradient(*states)
        return divergence + self.reward_weight * reward, stats


def make_objective(config: ATESDConfig) -> Objective:
    """The objective `config.objective` names."""
    distillation = Distillation(**{field.name: getattr(config, field.name) for field in fields(Distillation)})
    policy_gradient = PolicyGradient(temperature=config.temperature, chunk_bytes=config.chunk_bytes)
    return {
        "distill": distillation,
        "sft": SupervisedFineTuning(chunk_bytes=config.chunk_bytes),
        "grpo": policy_gradient,
        "distill+grpo": Mixed(distillation, policy_gradient, config.reward_weight),
    }[config.objective]


def position_weights(lengths: tuple[int, ...], halflife: float) -> Tensor:
    """`(N,)` float64: token n of a response of T tokens counts `2^(-n/halflife) * T / sum_m 2^(-m/halflife)`.

    Early tokens decide where a solution goes, and late ones are where student and teacher have drifted apart. The mean
    within each response is 1 (our choice), so that a response's share of the loss stays what it was.
    """
    parts = [torch.exp2(-torch.arange(n, dtype=torch.float64) / halflife) for n in lengths]
    return torch.cat([part * (len(part) / part.sum()) for part in parts])


def token_weight(tokens: ResponseTokens, halflife: float | None = None) -> Tensor | None:
    """The constant factor of each token's loss: `tokens.weight` times the position's; None where all are 1."""
    if halflife is None:
        return tokens.weight
    weight = to_device(position_weights(tokens.lengths, halflife), tokens.targets.device)
    return weight if tokens.weight is None else weight * tokens.weight


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.sum() if weight is None else (values * weight.to(values.dtype)).sum()


def head_logprobs(
    hidden: Tensor, head: HeadSpec, targets: Tensor, temperature: float, chunk_bytes: int | None = None
) -> tuple[Tensor, TokenStats]:
    """`(N,)` log-probabilities of `targets`, differentiable, and their statistics."""
    return linear_logprobs(
        hidden,
        head.weight,
        targets,
        **head.logprob_options(temperature),
        chunk_bytes=chunk_bytes,
        return_stats=True,
    )


@torch.no_grad()
def token_logprobs(
    backbone: Callable[..., Any], head: HeadSpec, batch: PackedBatch, chunk_bytes: int | None = None
) -> Tensor:
    """`(N,)`: log-probability, at temperature 1, of each response token of `batch`."""
    return head_logprobs(hidden_rows(backbone, batch), head, batch.targets, 1.0, chunk_bytes)[0]


class TokenTotals:
    """Sums of `TokenStats` over the micro-batches of a step, kept on the device until they are asked for."""

    NAMES = ("mismatch", "top1_agreement", "student_entropy", "teacher_entropy", "student_confidence")
    WITHOUT_TEACHER = ("student_entropy", "student_confidence")

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.divergences: list[Tensor] = []
        self.has_teacher = True

    def add(self, stats: TokenStats) -> None:
        self.has_teacher = stats.teacher_entropy is not None
        absent = torch.zeros_like(stats.student_entropy)
        columns = (
            stats.divergence,
            stats.top1_agree if self.has_teacher else absent,
            stats.student_entropy,
            stats.teacher_entropy if self.has_teacher else absent,
            stats.student_top1_prob,
        )
        self.sums.append(torch.stack([column.double().sum() for column in columns]))
        self.divergences.append(stats.divergence)

    def sum(self) -> Tensor:
        """`(5,)` float64, in the order of `NAMES`."""
        return torch.stack(self.sums).sum(0)

    def over(self, processes: Processes) -> None:
        """All-reduce the sums and gather the divergences: from here on they are those of all processes."""
        self.sums = [processes.all_reduce(self.sum())]
        self.divergences = [processes.gather(torch.cat(self.divergences))]

    def means(self, num_tokens: int) -> dict[str, float]:
        """The metrics of a step; without a teacher those that need none."""
        means = dict(zip(self.NAMES, (self.sum() / num_tokens).tolist(), strict=True))
        if not self.has_teacher:
            return {name: means[name] for name in self.WITHOUT_TEACHER}
        return means | {"mismatch_p95": self.p95()}

    def p95(self) -> float:
        """95th percentile of the token divergences (no clip applied)."""
        return percentile(torch.cat(self.divergences), 0.95)

    def share_above(self, bound: float) -> float:
        """The share of tokens whose divergence exceeds `bound`."""
        return float((torch.cat(self.divergences) > bound).double().mean())


def percentile(values: Tensor, share: float) -> float:
    """The value below which `share` of `values` lie, the nearest one below."""
    return float(values.float().sort().values[int(share * (len(values) - 1))])
