"""Rows that a data set gives as lists, arrays or tensors are one batch."""

from __future__ import annotations

import numpy
import pytest
import torch

from atesd_kernels.integrations.pairs import collate, pair_divergence

ROWS = [
    {"prompt_ids": [1, 2], "teacher_prompt_ids": [1, 2, 3], "response_ids": [7, 8]},
    {"prompt_ids": [4], "teacher_prompt_ids": [5, 6], "response_ids": [9]},
]
KINDS = {
    "tuples": tuple,
    "numpy": numpy.array,
    "numpy uint16": lambda ids: numpy.array(ids, dtype=numpy.uint16),
    "tensors": torch.tensor,
    "int32 tensors": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "lists of numpy numbers": lambda ids: [numpy.int64(i) for i in ids],
    "lists of tensors": lambda ids: [torch.tensor(i) for i in ids],
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_give_the_batch_of_lists(kind):
    batch = collate([{key: KINDS[kind](ids) for key, ids in row.items()} for row in ROWS], pad_token_id=3)
    for name, expected in collate(ROWS, pad_token_id=3).items():
        assert batch[name].dtype == torch.long and batch[name].equal(expected), name


@pytest.mark.parametrize("form", ("torch", "numpy", None))
def test_a_data_set_s_format_does_not_matter(form):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS).with_format(form)
    batch = collate([rows[i] for i in range(2)])
    assert all(batch[name].equal(expected) for name, expected in collate(ROWS).items())


@pytest.mark.parametrize("empty", ([], numpy.array([], dtype=numpy.int64), torch.zeros(0, dtype=torch.long)))
def test_an_empty_prompt_is_refused_and_an_empty_response_is_not(empty):
    with pytest.raises(ValueError, match="a row has an empty prompt_ids"):
        collate([{**ROWS[0], "prompt_ids": empty}])
    assert (collate([{**ROWS[0], "response_ids": empty}])["labels"] == -100).all()


@pytest.mark.parametrize(
    "wrong", ([1.5], ["a"], None, torch.tensor([[1, 2]]), numpy.array([1.0, 2.0]), 3, "12", [True])
)
def test_what_is_not_token_ids_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match="a row's teacher_prompt_ids must be a sequence of token ids, got"):
        collate([{**ROWS[0], "teacher_prompt_ids": wrong}])


MASKS = ([1, 0], [True, False], numpy.array([1, 0]), torch.tensor([1.0, 0.0]), torch.tensor([True, False]))


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_token_is_read_and_is_no_label(mask):
    batch = collate([{**ROWS[0], "response_mask": mask}, {**ROWS[1], "response_mask": None}])
    plain = collate(ROWS)
    assert batch["input_ids"].equal(plain["input_ids"]) and batch["attention_mask"].equal(plain["attention_mask"])
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, -100, -100]]
    assert batch["teacher_labels"].tolist() == [[-100, -100, -100, 7, -100], [-100, -100, 9, -100, -100]]


@pytest.mark.parametrize("mask", ([1], [1, 2], [[1, 0]], "10", [0.5, 1], 1))
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match="a row's response_mask needs a 0 or 1 for each of 2 tokens, got"):
        collate([{**ROWS[0], "response_mask": mask}])


def test_a_weight_is_one_number_a_row():
    assert "sample_weight" not in collate(ROWS)
    assert collate([{**ROWS[0], "weight": 0.25}, ROWS[1]])["sample_weight"].tolist() == [0.25, 1.0]
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"a row's weight is (-1|nan|inf)"):
            collate([{**ROWS[0], "weight": weight}])


def test_the_loss_of_masked_and_weighted_rows_is_that_of_their_tokens(tiny_model_path):
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny_model_path) for _ in range(2))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    row = {"prompt_ids": [1, 2], "teacher_prompt_ids": [1, 2, 3], "response_ids": [7, 8, 9]}

    def loss(*rows, **options):
        with torch.no_grad():
            return pair_divergence(student, collate(rows), teacher, num_tokens=1, **options).item()

    tokens = [loss({**row, "response_mask": [int(i == n) for i in range(3)]}) for n in range(3)]
    assert min(tokens) > 1e-4
    assert loss(row) == pytest.approx(sum(tokens), rel=1e-5)
    assert loss({**row, "response_mask": [0, 1, 1]}) == pytest.approx(tokens[1] + tokens[2], rel=1e-5)
    weighted = loss({**row, "weight": 0.5}, {**row, "weight": 0, "response_ids": [5]})
    assert weighted == pytest.approx(0.5 * sum(tokens), rel=1e-5)
    own = loss({**row, "weight": 0.5}, token_weight=torch.tensor([0.0, 0.0, 2.0]))
    assert own == pytest.approx(tokens[2], rel=1e-5)
    assert loss({**row, "response_mask": [0, 0, 0]}) == 0
