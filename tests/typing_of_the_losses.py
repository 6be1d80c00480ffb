"""How a user's type checker sees the losses: checked by mypy in `make lint`, never run."""

from typing import assert_type

from torch import Tensor, zeros

from atesd_kernels import TokenStats, divergence, linear_divergence, linear_logprobs, linear_topk_divergence

hidden, head, ids = zeros(2, 4), zeros(9, 4), zeros(2)
assert_type(linear_divergence(hidden, head, hidden, divergence="jsd", beta=0.3, mask=ids), Tensor)
assert_type(linear_divergence(hidden, head, hidden, head, return_stats=True), tuple[Tensor, TokenStats])
assert_type(linear_divergence(hidden, head, [hidden, hidden], [None, head], teacher_mix=zeros(2)), Tensor)
assert_type(divergence(hidden, hidden, reduction="none"), Tensor)
assert_type(linear_logprobs(hidden, head, ids, return_stats=True), tuple[Tensor, TokenStats])
assert_type(linear_topk_divergence(hidden, head, ids, hidden, tail="ignore"), Tensor)
assert_type(linear_topk_divergence(hidden, head, ids, hidden, return_stats=True), tuple[Tensor, TokenStats])
linear_divergence(hidden, head, hidden, temprature=1.1)  # type: ignore[call-overload]
