"""An embedding that adds its gradient in place has the gradient of one that does not."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from atesd_kernels.integrations.embedding import accumulate_in_place


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_gradients_of_several_batches_add_up(padding_idx):
    ours, torchs = Model(padding_idx=padding_idx), Model(padding_idx=padding_idx)
    assert accumulate_in_place(ours)
    weight, kept = ours.embedding.weight, None
    for seed in range(3):
        ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(seed))
        ids[0, :3] = 3  # repeated, and the padding
        for model in (ours, torchs):
            rows = model.embedding(ids)
            (rows * torch.linspace(0, 1, rows.numel()).view_as(rows)).sum().backward()
        kept = weight.grad if kept is None else kept
        assert weight.grad is kept  # not a new matrix for each batch
    torch.testing.assert_close(weight.grad, torchs.embedding.weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_other_kinds_of_embeddings_stay_torch_s(options):
    assert not accumulate_in_place(Model(**options))


def test_a_frozen_embedding_stays_as_it_is():
    model = Model()
    model.embedding.weight.requires_grad_(False)
    assert not accumulate_in_place(model) and type(model.embedding) is nn.Embedding


def test_a_model_without_an_input_embedding_stays_as_it_is():
    assert not accumulate_in_place(nn.Linear(2, 2))


def test_a_copy_has_a_weight_of_its_own():
    model = Model()
    assert accumulate_in_place(model)
    copy = deepcopy(model)
    copy.embedding(torch.tensor([1])).sum().backward()
    assert model.embedding.weight.grad is None and copy.embedding.weight.grad[1].eq(1).all()
