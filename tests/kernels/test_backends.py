"""The backends have the functions that `atesd_kernels.backends.Backend` describes, with its arguments."""

from __future__ import annotations

import inspect

import pytest

from atesd_kernels.backends import Backend, torch_chunked, torch_logprobs, triton_chunked

FUNCTIONS = [
    (torch_chunked.divergence_rows, Backend.divergence_rows),
    (torch_chunked.divergence_logits, Backend.divergence_logits),
    (torch_logprobs.logprob_rows, Backend.logprob_rows),
    (triton_chunked.divergence_rows, Backend.divergence_rows),
    (triton_chunked.divergence_logits, Backend.divergence_logits),
    (triton_chunked.logprob_rows, Backend.logprob_rows),
]


@pytest.mark.parametrize("function, protocol", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_a_backend_s_function_takes_what_the_protocol_says(function, protocol):
    described = inspect.signature(protocol)
    _, *parameters = described.parameters.values()
    assert inspect.signature(function) == described.replace(parameters=parameters)
