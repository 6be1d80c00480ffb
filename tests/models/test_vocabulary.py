"""Two models of one vocabulary: compared by ids, over the entries that both have and the tokenizer knows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from atesd.models.loading import ModelLoadError
from atesd.models.vocabulary import check_same_vocabulary, num_entries, over_same_entries, with_entries
from atesd.objectives import Distillation, ResponseTokens
from atesd_kernels.integrations.head import HeadSpec


@pytest.fixture
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


class Renamed:
    """A tokenizer whose vocabulary is another's, changed."""

    def __init__(self, tokenizer, changes):
        self.vocab = {token: i for token, i in {**tokenizer.get_vocab(), **changes}.items() if i is not None}

    def get_vocab(self):
        return self.vocab


def test_the_same_ids_are_the_same_vocabulary_whatever_the_special_tokens_are_for(tokenizer, tiny_model_path):
    other = AutoTokenizer.from_pretrained(tiny_model_path)
    other.eos_token, other.chat_template = "<|endoftext|>", "another"
    check_same_vocabulary(tokenizer, other, "student", "teacher")
    assert num_entries(tokenizer) == len(tokenizer)


@pytest.mark.parametrize(("changes", "seen"), [
    ({"the": 5000}, r"in 1 of \d+ tokens: 'the' is token 5000 of the teacher and token \d+ of the student"),
    ({"<think>": 300}, "in 1 of 300 tokens: '<think>' is token 300 of the teacher and no token of the student"),
    ({"the": None}, r"in 1 of 300 tokens: 'the' is no token of the teacher and token \d+ of the student"),
], ids=["another id", "one more", "one less"])  # fmt: skip
def test_a_tokenizer_that_differs_in_one_id_is_refused_by_name(tokenizer, changes, seen):
    with pytest.raises(ModelLoadError, match=f"teacher_model_name_or_path is 'big', .* that of 'small' {seen}"):
        check_same_vocabulary(tokenizer, Renamed(tokenizer, changes), "small", "big")


def dense_kl(student_hidden, student, teacher_hidden, teacher, known):
    """Forward KL over the first `known` entries, in float64."""
    logits = [
        h.transform(x.double() @ h.weight.double().T + (0.0 if h.bias is None else h.bias.double()))
        for x, h in ((student_hidden, student), (teacher_hidden, teacher))
    ]
    q, p = (z[:, :known].log_softmax(-1) for z in logits)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(96, 96), (96, 128), (128, 96), (90, 90)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_over_the_entries_that_both_heads_and_the_tokenizer_have(student_rows, teacher_rows, bias):
    torch.manual_seed(0)
    known = 90
    student_hidden, teacher_hidden = torch.randn(7, 16, requires_grad=True), torch.randn(7, 24)
    heads = []
    for rows, width in ((student_rows, 16), (teacher_rows, 24)):
        weight = torch.randn(rows, width)
        weight[known:] *= 50  # nobody trained them: they would take the mass of every token
        heads.append(HeadSpec(weight, torch.randn(rows) if bias else None, softcap=20.0, scale=0.5 + width / 48))
    student, teacher = heads[0], heads[1]
    weight = student.weight.requires_grad_()
    rows = min(student_rows, teacher_rows)
    tokens = ResponseTokens(torch.randint(known, (7,)), (7,))
    with pytest.raises(ValueError, match="softcap"):  # of the loss; each head caps before it scales
        Distillation()(student_hidden, student, teacher_hidden, with_entries(teacher, rows, known), tokens, 7)
    student, teacher = (HeadSpec(h.weight, h.bias, None, h.scale) for h in heads)
    loss, stats = Distillation()(student_hidden, student, teacher_hidden, with_entries(teacher, rows, known), tokens, 7)
    loss.backward()
    gradients = [student_hidden.grad.clone(), weight.grad.clone()]
    student_hidden.grad = weight.grad = None
    expected = dense_kl(student_hidden, student, teacher_hidden, teacher, known)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and stats.student_logprob.isfinite().all()
    for got, wanted in zip(gradients, (student_hidden.grad, weight.grad), strict=True):
        assert (got - wanted).norm() < 1e-4 * wanted.norm()
    assert not gradients[1][known:].any()


def test_an_entry_that_either_head_excludes_is_excluded_in_both():
    student, teacher = HeadSpec(torch.randn(8, 4)), HeadSpec(torch.randn(8, 6), torch.zeros(8))
    teacher.bias[2] = -torch.inf
    pair = over_same_entries(student, teacher)
    assert all(head.bias.isneginf().tolist() == [i == 2 for i in range(8)] for head in pair)
    excluding = HeadSpec(torch.randn(8, 4), teacher.bias)
    pair = over_same_entries(excluding, HeadSpec(torch.randn(8, 6)))
    assert pair[1].bias.isneginf().tolist() == [i == 2 for i in range(8)]


def test_equal_heads_without_a_bias_are_left_as_they_are():
    student, teacher = HeadSpec(torch.randn(8, 4)), HeadSpec(torch.randn(8, 6))
    assert over_same_entries(student, teacher) == (student, teacher)
