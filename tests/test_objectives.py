"""The distillation objective against a dense one written out here, and its normalisation over micro-batches."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from atesd.evaluation.reward import group_advantages
from atesd.models.attention.packed import use_packed_attention
from atesd.models.batching import hidden_rows, pack
from atesd.models.scoring import token_logprobs
from atesd.objectives import (
    Distillation,
    Mixed,
    PolicyGradient,
    ResponseTokens,
    SupervisedFineTuning,
    TeacherAdvantage,
    TokenTotals,
    position_weights,
)
from atesd_kernels import TokenStats
from atesd_kernels.integrations.head import HeadSpec, hidden_states_and_head

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
READ = [[50, 51, 52, 53, 5, 6, 7], [54, 8, 9], [55, 56, 10, 11, 12, 13], [57, 58, 14]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26, 27], [28], [29, 30, 31]]
TOKENS = sum(map(len, RESPONSES))
ADVANTAGES = [0.5, -1.5, 2.0, 0.25]


@pytest.fixture
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float64)
    # weights large enough for the context to matter: teacher and student really differ
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.dim() == 2:
                p.normal_(std=0.3)
        model.model.embed_tokens.weight.normal_(std=0.3)
    use_packed_attention(model)
    return model


def step(model, micro_batch, objective, weight=None):
    """Gradients and loss of one step in micro-batches; the teacher is the same model with the longer prompts."""
    model.zero_grad()
    backbone, head = hidden_states_and_head(model)
    loss, totals = 0.0, TokenTotals()
    for start in range(0, len(PROMPTS), micro_batch):
        part = slice(start, start + micro_batch)
        student = pack(PROMPTS[part], RESPONSES[part], "cpu")
        with torch.no_grad():
            teacher_hidden = hidden_rows(backbone, pack(READ[part], RESPONSES[part], "cpu"))
        tokens = ResponseTokens(student.targets, student.lengths, tuple(ADVANTAGES[part]), weight)
        part_loss, stats = objective(hidden_rows(backbone, student), head, teacher_hidden, None, tokens, TOKENS)
        part_loss.backward()
        loss += part_loss.item()
        totals.add(stats)
    return loss, [p.grad.clone() for p in model.parameters()], totals


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "separate heads"])
def test_softcap_and_scale_of_one_head_reach_the_divergence_and_the_log_probs(shared):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64)
    head, other = (HeadSpec(torch.randn(11, 8, dtype=torch.float64), torch.randn(11).double(), 2.0, 0.4) for _ in "12")
    tokens = ResponseTokens(torch.tensor([3, 1, 4, 1, 5]), (2, 3))
    t = (head if shared else other).logits(teacher) / 1.1
    log_q, log_p = (head.logits(student) / 1.1).log_softmax(-1), t.log_softmax(-1)
    loss, _ = Distillation(scoring_temperature=1.1)(student, head, teacher, None if shared else other, tokens, 5)
    assert loss.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-9)
    nll, _ = SupervisedFineTuning()(student, head, None, None, tokens, 5)
    exact = head.logits(student).log_softmax(-1).gather(1, tokens.targets[:, None]).mean()
    assert nll.item() == pytest.approx(-exact.item(), rel=1e-9)


def dense_opsd(model, temperature, entry_clip):
    """OPSD's loss as its authors would write it: whole logits, one sequence at a time, entry-clipped forward KL."""
    model.zero_grad()
    total = 0.0
    for prompt, read, response in zip(PROMPTS, READ, RESPONSES, strict=True):
        s = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        with torch.no_grad():
            t = model(torch.tensor([read + response])).logits[0, len(read) - 1 : -1] / temperature
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        entries = log_p.exp() * (log_p - log_q)
        total = total + (entries if entry_clip is None else entries.clamp(max=entry_clip)).sum()
    loss = total / TOKENS
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def dense_terms(model, temperature):
    """Of each response: log-probs of its tokens (T,), and the forward KL to the teacher of each (T,)."""
    for prompt, read, response in zip(PROMPTS, READ, RESPONSES, strict=True):
        s = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        with torch.no_grad():
            t = model(torch.tensor([read + response])).logits[0, len(read) - 1 : -1] / temperature
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        yield log_q[range(len(response)), response], (log_p.exp() * (log_p - log_q)).sum(-1)


def assert_is(model, objective, dense_loss, weight=None):
    """Loss and gradient of `objective` are those of `dense_loss()`, whose loss is not zero."""
    loss, gradient, _ = step(model, 4, objective, weight)
    model.zero_grad()
    expected = dense_loss()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    expected_gradient = [p.grad.clone() for p in model.parameters()]
    assert sum(g.abs().sum() for g in expected_gradient) > 0.1
    assert relative_error(gradient, expected_gradient) < 1e-9
    if weight is None:  # and the same in micro-batches
        assert relative_error(step(model, 1, objective)[1], expected_gradient) < 1e-9


def test_sft_is_the_mean_cross_entropy_of_the_reference_tokens(model):
    def dense():
        losses = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum"))
        return sum(losses) / TOKENS

    assert_is(model, SupervisedFineTuning(), dense)


def test_grpo_is_the_policy_gradient_of_the_advantages(model):
    def dense():
        """sum over tokens of A * p / [p]: the ratio written with probabilities, not log-probabilities."""
        total = 0.0
        for A, (logp, _) in zip(ADVANTAGES, dense_terms(model, 1.1), strict=True):
            total = total - (A * logp.exp() / logp.exp().detach()).sum()
        return total / TOKENS

    assert_is(model, PolicyGradient(temperature=1.1), dense)


def test_the_policy_gradient_of_the_teacher_is_that_of_the_sampled_tokens(model):
    def dense():
        total = 0.0
        for prompt, read, response in zip(PROMPTS, READ, RESPONSES, strict=True):
            s = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 1.1
            with torch.no_grad():
                t = model(torch.tensor([read + response])).logits[0, len(read) - 1 : -1] / 1.1
            chosen = (range(len(response)), response)
            log_q, log_p = s.log_softmax(-1)[chosen], t.log_softmax(-1)[chosen]
            total = total - ((log_p - log_q).detach() * log_q.exp() / log_q.exp().detach()).sum()
        return total / TOKENS

    assert_is(model, TeacherAdvantage(1.1), dense)
    loss, _, totals = step(model, 3, TeacherAdvantage(1.1))
    means = totals.means(TOKENS)
    assert means["mismatch"] == pytest.approx(loss, rel=1e-6) and "top1_agreement" not in means
    exact = step(model, 4, Distillation(scoring_temperature=1.1))[2].means(TOKENS)
    for name in ("student_entropy", "teacher_entropy", "student_confidence"):
        assert means[name] == pytest.approx(exact[name], rel=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "separate heads"])
def test_its_mean_over_the_students_tokens_is_the_gradient_of_reverse_kl(shared):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 8, dtype=torch.float64)
    student.requires_grad_()
    head, other = (HeadSpec(torch.randn(11, 8, dtype=torch.float64)) for _ in range(2))
    other = head if shared else other
    log_q, log_p = head.logits(student).log_softmax(-1), other.logits(teacher).log_softmax(-1)
    expected = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student, retain_graph=True)[0]
    tokens = ResponseTokens(torch.arange(11), (11,), weight=log_q.detach()[0].exp())
    repeated = (student.expand(11, 8), head, teacher.expand(11, 8), None if shared else other, tokens, 1)
    got = torch.autograd.grad(TeacherAdvantage()(*repeated)[0], student)[0]
    assert (got - expected).norm() <= 1e-9 * expected.norm()


def test_importance_ratios_multiply_each_tokens_policy_gradient(model):
    weight = torch.linspace(0.2, 2.0, TOKENS, dtype=torch.float64)

    def dense():
        logp = torch.cat([logp for logp, _ in dense_terms(model, 1.0)])
        A = torch.cat([torch.full((len(r),), a).double() for a, r in zip(ADVANTAGES, RESPONSES, strict=True)])
        return -(weight * A * (logp - logp.detach() + 1)).sum() / TOKENS

    assert_is(model, PolicyGradient(), dense, weight)


def test_the_mixed_objective_is_the_weighted_sum_of_both(model):
    def dense():
        terms = list(dense_terms(model, 1.1))
        divergence = torch.cat([kl for _, kl in terms]).sum()
        gain = sum(A * (logp - logp.detach() + 1).sum() for A, (logp, _) in zip(ADVANTAGES, terms, strict=True))
        return (divergence - 0.3 * gain) / TOKENS

    objective = Mixed(Distillation(scoring_temperature=1.1), PolicyGradient(temperature=1.1), reward_weight=0.3)
    assert_is(model, objective, dense)


def test_position_weights_halve_and_keep_a_responses_share_of_the_loss(model):
    weights = position_weights((2, 6, 1), halflife=2.0).split([2, 6, 1])
    assert all(part.mean().item() == pytest.approx(1) for part in weights)
    assert (weights[1][2] / weights[1][0]).item() == pytest.approx(0.5)

    def dense():
        total = 0.0
        for _, kl in dense_terms(model, 1.0):
            w = torch.tensor([0.5 ** (n / 2) for n in range(len(kl))], dtype=torch.float64)
            total = total + (w / w.mean() * kl).sum()
        return total / TOKENS

    assert_is(model, Distillation(position_halflife=2.0), dense)


def dense_by_response(model, objective):
    """The mean over responses of the mean over their tokens: each response is a step of its own."""
    backbone, head = hidden_states_and_head(model)
    losses = []
    for i, reply in enumerate(RESPONSES):
        student, teacher = pack(PROMPTS[i : i + 1], [reply], "cpu"), pack(READ[i : i + 1], [reply], "cpu")
        with torch.no_grad():
            read = hidden_rows(backbone, teacher)
        tokens = ResponseTokens(student.targets, student.lengths, (ADVANTAGES[i],))
        losses.append(objective(hidden_rows(backbone, student), head, read, None, tokens, len(reply))[0])
    return torch.stack(losses).mean()


BY_SEQUENCE = {
    "distill": Distillation(),
    "with positions": Distillation(position_halflife=2.0),
    "sft": SupervisedFineTuning(),
    "grpo": PolicyGradient(),
    "policy_gradient": TeacherAdvantage(),
    "mixed": Mixed(Distillation(), PolicyGradient(), 0.5),
}


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("objective", BY_SEQUENCE.values(), ids=BY_SEQUENCE)
def test_each_response_counts_alike_if_the_loss_is_aggregated_by_sequence(model, objective, micro_batch):
    expected = dense_by_response(model, objective)
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    backbone, head = hidden_states_and_head(model)
    loss = 0.0
    for start in range(0, len(PROMPTS), micro_batch):
        part = slice(start, start + micro_batch)
        student = pack(PROMPTS[part], RESPONSES[part], "cpu")
        with torch.no_grad():
            read = hidden_rows(backbone, pack(READ[part], RESPONSES[part], "cpu"))
        tokens = ResponseTokens(
            student.targets, student.lengths, tuple(ADVANTAGES[part]), mean_length=TOKENS / len(RESPONSES)
        )
        part_loss, _ = objective(hidden_rows(backbone, student), head, read, None, tokens, TOKENS)
        part_loss.backward()
        loss += part_loss.item()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    got = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, dense in zip(got, wanted, strict=True):
        assert (ours - dense).norm() <= 1e-9 * dense.norm()


@pytest.mark.parametrize("mean_length", [None, TOKENS / len(RESPONSES)], ids=["token", "sequence"])
@pytest.mark.parametrize("objective", BY_SEQUENCE.values(), ids=BY_SEQUENCE)
def test_a_problem_s_weight_is_the_factor_of_its_tokens_and_not_of_the_denominator(model, objective, mean_length):
    backbone, head = hidden_states_and_head(model)

    def loss_of(part, weights):
        student = pack(PROMPTS[part], RESPONSES[part], "cpu")
        with torch.no_grad():
            read = hidden_rows(backbone, pack(READ[part], RESPONSES[part], "cpu"))
        tokens = ResponseTokens(student.targets, student.lengths, tuple(ADVANTAGES[part]), None, mean_length, weights)
        return objective(hidden_rows(backbone, student), head, read, None, tokens, TOKENS)

    weights = (0.0, 2.0, 1.0, 0.25)
    loss, stats = loss_of(slice(None), weights)
    alone = [loss_of(slice(i, i + 1), None)[0] for i in range(len(RESPONSES))]
    assert loss.item() == pytest.approx(sum(w * part.item() for w, part in zip(weights, alone, strict=True)), rel=1e-9)
    torch.testing.assert_close(stats.divergence, loss_of(slice(None), None)[1].divergence)  # statistics have no weights
    gradient = torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
    wanted = sum(w * torch.autograd.grad(part, head.weight)[0] for w, part in zip(weights, alone, strict=True))
    assert (gradient - wanted).norm() <= 1e-9 * wanted.norm()


def test_group_advantages_compare_a_problems_responses_with_each_other_only():
    got = group_advantages([1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1], group=4)
    assert got[:4] == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-3)  # (r - 1/4) / (1/2)
    assert got[4:8] == [0, 0, 0, 0]
    assert sum(got[8:]) == pytest.approx(0) and got[9] > 0 > got[8]
    with pytest.raises(ValueError, match="do not make groups of 1"):
        group_advantages([1.0], group=1)


def relative_error(got, expected):
    difference = sum((a - b).square().sum() for a, b in zip(got, expected, strict=True))
    return float((difference / sum(b.square().sum() for b in expected)).sqrt())


@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_the_loss_and_its_gradient_are_those_of_dense_opsd(model, entry_clip):
    objective = Distillation(scoring_temperature=1.1, entry_clip=entry_clip)
    loss, gradient, _ = step(model, 4, objective)
    expected_loss, expected = dense_opsd(model, 1.1, entry_clip)
    assert abs(expected_loss) > 0.01
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert relative_error(gradient, expected) < 1e-9


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_give_the_loss_gradient_and_statistics_of_one_large_batch(model, micro_batch):
    objective = Distillation(entry_clip=0.05)
    loss, gradient, totals = step(model, micro_batch, objective)
    expected_loss, expected, expected_totals = step(model, 4, objective)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert relative_error(gradient, expected) < 1e-12
    torch.testing.assert_close(totals.sum(), expected_totals.sum(), rtol=1e-12, atol=1e-12)
    assert totals.p95() == pytest.approx(expected_totals.p95(), rel=1e-6)


def test_averaging_micro_batches_with_equal_weight_would_be_another_gradient(model):
    """The check above can fail: the responses have different lengths."""
    loss, expected, _ = step(model, 4, Distillation())
    assert loss > 0.01
    model.zero_grad()
    backbone, head = hidden_states_and_head(model)
    for i in range(4):
        student = pack(PROMPTS[i : i + 1], RESPONSES[i : i + 1], "cpu")
        with torch.no_grad():
            teacher_hidden = hidden_rows(backbone, pack(READ[i : i + 1], RESPONSES[i : i + 1], "cpu"))
        loss, _ = Distillation()(
            hidden_rows(backbone, student),
            head,
            teacher_hidden,
            None,
            ResponseTokens(student.targets, student.lengths),
            len(RESPONSES[i]),
        )
        (loss / 4).backward()
    assert relative_error([p.grad for p in model.parameters()], expected) > 0.05


def test_reference_log_probs_are_those_of_the_dense_model_and_carry_no_gradient(model):
    backbone, head = hidden_states_and_head(model)
    got = token_logprobs(backbone, head, pack(PROMPTS, RESPONSES, "cpu"))
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        log_q = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected += log_q[range(len(response)), response].tolist()
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert not got.requires_grad


def test_totals_are_sums_over_tokens_and_the_percentile_is_over_all_of_them():
    def stats(values):
        x = torch.tensor(values)
        return TokenStats(x, x * 2, x * 3, x, x, x / 10, x > 2)

    totals = TokenTotals()
    totals.add(stats([1.0, 2.0]))
    totals.add(stats([3.0]))
    assert totals.means(3) == pytest.approx(
        {
            "mismatch": 2.0,
            "top1_agreement": 1 / 3,
            "student_entropy": 4.0,
            "teacher_entropy": 6.0,
            "student_confidence": 0.2,
            "mismatch_p95": 2.0,
        }
    )
    many = TokenTotals()
    for value in range(101):
        many.add(stats([float(value)]))
    assert many.p95() == 95.0
