"""Rows that a data set gives as lists, arrays or tensors are one batch."""

from __future__ import annotations

import numpy
import pytest
import torch

from atesd_kernels.integrations.pairs import collate

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
