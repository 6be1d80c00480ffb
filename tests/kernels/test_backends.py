"""The backends have the functions that `atesd_kernels.backends.Backend` describes, with its arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

from atesd_kernels import linear_divergence, planning
from atesd_kernels.backends import (
    Backend,
    TopkBackend,
    torch_chunked,
    torch_logprobs,
    torch_topk,
    triton_chunked,
    triton_topk,
)

FUNCTIONS = [
    (torch_chunked.divergence_rows, Backend.divergence_rows),
    (torch_chunked.divergence_logits, Backend.divergence_logits),
    (torch_logprobs.logprob_rows, Backend.logprob_rows),
    (triton_chunked.divergence_rows, Backend.divergence_rows),
    (triton_chunked.divergence_logits, Backend.divergence_logits),
    (triton_chunked.logprob_rows, Backend.logprob_rows),
    *(
        (getattr(b, f), getattr(TopkBackend, f))
        for b in (torch_topk, triton_topk)
        for f in ("topk_rows", "topk_logits")
    ),
]


@pytest.mark.parametrize("function, protocol", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_a_backend_s_function_takes_what_the_protocol_says(function, protocol):
    described = inspect.signature(protocol)
    _, *parameters = described.parameters.values()
    assert inspect.signature(function) == described.replace(parameters=parameters)


def test_the_functions_a_backend_of_ones_own_must_have_are_the_protocol_s():
    described = [name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")]
    assert sorted(planning.FUNCTIONS) == sorted(described)


@pytest.mark.parametrize(
    ("name", "told"),
    (
        ("no_such_module:Dense", "cannot be imported .*no_such_module"),
        ("json:Dense", "cannot be imported .*Dense"),
        (":Dense", "cannot be imported"),
        ("json:dumps", "lacks divergence_rows, divergence_logits, logprob_rows"),
        ("atesd_kernels.backends:torch_chunked", "lacks logprob_rows"),
    ),
)
def test_a_backend_that_cannot_compute_is_refused_before_it_is_asked_to(name, told):
    hidden, head = torch.zeros(3, 8), torch.zeros(20, 8)
    with pytest.raises(ValueError, match=told):
        linear_divergence(hidden, head, hidden, backend=name)
