"""Converts users' arguments to operators' inputs: checks and resolves options, flattens masks and weights to rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .divergences import get_divergence
from .planning import choose_backend
from .shards import is_dtensor
from .spec import accumulate_dtype


class Checked(NamedTuple):
    """Checked options of a divergence, for its operator."""

    mask: Tensor | None  # [N] bool
    row_weight: Tensor | None  # [N], see row_weight_of
    targets: Tensor | None  # [N]
    options: dict[str, Any]  # fields of DivergenceSpec


def checked_divergence(
    lead: torch.Size, device, dtype, *, divergence, beta, mask, token_weight, targets, reduction, num_tokens, backend,
    vocab: int, **numbers: float | None,
) -> Checked:  # fmt: skip
    """Checks the options that `linear_divergence` and `divergence` share, and returns them resolved."""
    checks.check_scalars(reduction=reduction, **numbers)
    checks.check_token_tensors(lead, device, mask=mask, token_weight=token_weight, targets=targets)
    term = get_divergence(divergence, beta)
    options = plain_numbers(beta=beta, **numbers)
    if options["teacher_temperature"] is None:
        options["teacher_temperature"] = options["temperature"]
    options["backend"] = choose_backend(backend, device, dtype, term.triton is not None, lead.numel() * vocab)
    options["divergence"] = term.key
    row_weight = row_weight_of(token_weight, mask, lead.numel(), device, dtype, reduction, num_tokens)
    return Checked(flat_mask(mask), row_weight, None if targets is None else flat_targets(targets), options)


def checked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask, bias, backend, logits_dtype, **numbers: float | None
) -> dict[str, Any]:
    """Checks the arguments of `linear_logprobs`. Returns fields of `LogprobSpec`."""
    checks.check_head("student", hidden, weight, bias)
    checks.check_scalars(**numbers)
    checks.check_token_tensors(hidden.shape[:-1], hidden.device, mask=mask, targets=targets)
    dtype = checked_compute_dtype(hidden, logits_dtype, weight=weight)
    backend = choose_backend(backend, hidden.device, dtype, True, targets.numel() * len(weight))
    return {**plain_numbers(**numbers), "backend": backend, "logits_dtype": logits_dtype, "compute_dtype": dtype}


def plain_numbers(**numbers: float | None) -> dict[str, float | None]:
    """Returns Python floats, and an int for `chunk_bytes`: `LossSpec.encode` needs the `repr` of Python's own types."""
    return {n: None if x is None else int(x) if n == "chunk_bytes" else float(x) for n, x in numbers.items()}


def checked_compute_dtype(hidden: Tensor, logits_dtype: torch.dtype, **heads: Tensor | None) -> torch.dtype:
    """Checks dtypes and returns that of the GEMMs: autocast's if it is on (it casts all operands), else the inputs'."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype, heads = torch.get_autocast_dtype(device), {}
    else:
        dtype = hidden.dtype
    checks.check_dtypes(dtype, logits_dtype, **heads)
    return dtype


def gradients_wanted(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Any]:
    """Returns the fields of `LossSpec` that say which inputs need a gradient.

    Raises:
        RuntimeError: if an input carries a forward-mode tangent, because the operators would drop it.
    """
    if any(has_tangent(t) for t in (hidden, weight, bias) if t is not None):
        raise RuntimeError(
            "the losses of atesd_kernels have no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad): call backward(), or use atesd_kernels.reference on small inputs."
        )
    enabled = torch.is_grad_enabled()
    inputs = (("hidden_grad", hidden), ("weight_grad", weight), ("bias_grad", bias))
    return {name: enabled and t is not None and t.requires_grad for name, t in inputs}


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation may reach `tensor`: inside `hessian` its tangent is hidden by a wrapper."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or forward_ad.unpack_dual(tensor).tangent is not None


def flat_targets(targets: Tensor) -> Tensor:
    """Returns int64 targets, `[N]`: a narrower dtype cannot be compared with every vocabulary size."""
    return targets.reshape(-1).long()


def flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).bool()


def teacher_bias_of(teacher, student_bias) -> Tensor | None:
    """Returns the bias of a teacher (`views.View`), or None if the bias of a shared head cancels in the difference."""
    if teacher.bias is None or (teacher.weight is None and teacher.bias is student_bias):
        return None
    return teacher.bias.detach()


def row_weight_of(token_weight, mask, num_rows: int, device, dtype, reduction: str, num_tokens) -> Tensor | None:
    """Returns the factor of each row's value in the loss, `[N]`; None if all factors are 1."""
    num_tokens = token_count(num_tokens)
    weight = None if token_weight is None else token_weight.detach().reshape(-1).to(accumulate_dtype(dtype))
    mask = flat_mask(mask)
    if weight is not None and mask is not None:
        weight = torch.where(mask, weight, 0.0)  # a masked token's weight may be NaN
    if reduction != "mean":
        return weight
    if num_tokens is None:
        num_tokens = max(num_rows, 1) if mask is None else mask.sum().clamp_min(1)
    weight = torch.ones(num_rows, dtype=accumulate_dtype(dtype), device=device) if weight is None else weight
    return weight / num_tokens


def token_count(num_tokens: Any) -> float | Tensor | None:
    """Returns the mean's denominator: None, a positive number, or a GPU's tensor of one.

    Reading a GPU's tensor would synchronise. If it is 0, it becomes the smallest number: the loss of a batch without
    tokens is then 0.
    """
    if num_tokens is None:
        return None
    checks.check_one_number("num_tokens", num_tokens)
    if isinstance(num_tokens, Tensor) and (num_tokens.device.type != "cpu" or torch.compiler.is_compiling()):
        return num_tokens.detach().reshape(()).float().clamp_min(torch.finfo(torch.float32).tiny)
    number = num_tokens if isinstance(num_tokens, (int, float)) else num_tokens.item()
    checks.check_num_tokens(number)
    return number


def same_storage(a: Any, b: Any) -> bool:
    """Whether `b` is `a`, or a view of all its elements such as `a.detach()`."""
    if a is b or torch.compiler.is_compiling() or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    if is_dtensor(a) and is_dtensor(b):  # data_ptr() of a DTensor is 0
        return a.placements == b.placements and same_storage(a.to_local(), b.to_local())
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
