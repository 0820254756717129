"""RMS norms of tokens, with the residual sum that comes before them in the same pass.

Letters: D width; leading sizes are free, T is their product.

Notable choices: statistics are fp32; the sum has the wider of the two dtypes and is normed as it is stored; the backward reads what was
normed and nothing else that the forward made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.token_mixing import dispatch, reference
from foveal.kernels.token_mixing.launching import Form, Operator, ceil, shared

PARTS = 1056  # programs of a backward
ELEMENTS = 2048  # of a tile


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None, implementation: str | None = None
) -> Tensor:
    """x / rms(x) * weight over the last dimension. x [.., D], weight [D]; dtype of the result: default x's. Differentiable."""
    dtype = x.dtype if dtype is None else dtype
    _check(x, weight)
    if not dispatch.fused(implementation, x, weight):
        return reference.rms_norm(x, weight, eps, dtype)
    return _alone(x, weight, eps, dtype)


def add_rms_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None, implementation: str | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> x + added, and its norm (see ``rms_norm``). x and added [.., D]."""
    total = torch.promote_types(x.dtype, added.dtype)
    dtype = total if dtype is None else dtype
    _check(x, weight)
    if x.shape != added.shape:
        raise ValueError(f"x {tuple(x.shape)} and added {tuple(added.shape)} differ; pass tensors of one shape.")
    if not dispatch.fused(implementation, x, added, weight):
        both = x + added
        return both, reference.rms_norm(both, weight, eps, dtype)
    return _with_sum(x, added, weight, eps, dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; it needs one number a channel."
        )


def _rows(x: Tensor) -> Tensor:
    """[T, D], with the last stride 1; a copy only where the rows do not lie evenly."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(d: int) -> dict[str, int]:
    width = 1 << (d - 1).bit_length()
    return {"D": d, "DP": width, "ROWS": max(1, min(16, ELEMENTS // width))}


@functools.lru_cache(maxsize=256)
def _form(d: int, add: bool) -> Form:
    from foveal.kernels.token_mixing.norm_kernels import norm

    return Form(norm, _tile(d) | {"ADD": add}, num_warps=4)


@functools.lru_cache(maxsize=256)
def _gradient_form(d: int, add: bool, has_sum: bool) -> Form:
    from foveal.kernels.token_mixing.norm_kernels import norm_backward

    return Form(norm_backward, _tile(d) | {"HAS_SUM": has_sum, "ADD": add}, num_warps=4)


def _launch(x: Tensor, added: Tensor | None, total: Tensor, y: Tensor, weight: Tensor, eps: float) -> None:
    if y.numel():
        rows = _rows(x)
        extra = rows if added is None else _rows(added)
        count, d = rows.shape
        form = _form(d, added is not None)
        form(
            ceil(count, form.constants["ROWS"]),
            (rows, extra, weight, total, y),
            (rows.stride(0), extra.stride(0)),
            (count,),
            (eps,),
        )


def norm_into(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """y = norm(x), both contiguous; no check is made."""
    count, d = x.numel() // x.shape[-1], x.shape[-1]
    form = _form(d, False)
    form(ceil(count, form.constants["ROWS"]), (x, x, weight, y, y), (d, d), (count,), (eps,))


def _run(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, None, y, y, weight, eps)
    return y


def _run_with_sum(x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, added.dtype), device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, added, total, y, weight, eps)
    return total, y


def _fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_with_sum(x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, added.dtype)), x.new_empty(x.shape, dtype=dtype)


def _gradients(
    d_sum: Tensor | None, d_y: Tensor, normed: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x, added (empty where it is x's, or there is none) and weight."""
    rows = _rows(normed)
    count, d = rows.shape
    d_x = torch.empty(normed.shape, dtype=x_dtype, device=normed.device)
    other = added_dtype is not None and added_dtype != x_dtype
    d_added = torch.empty(normed.shape if other else (0,), dtype=added_dtype or x_dtype, device=normed.device)
    form = _gradient_form(d, other, d_sum is not None)
    parts, per = shared(count, PARTS, form.constants["ROWS"])
    sums = torch.empty(parts, d, dtype=torch.float32, device=normed.device)
    if parts:
        d_y = d_y.contiguous()
        tensors = (
            rows,
            weight,
            d_y,
            d_y if d_sum is None else d_sum.contiguous(),
            d_x,
            d_added if other else d_x,
            sums,
        )
        form(parts, tensors, (rows.stride(0),), (count, per), (eps,))
    return d_x, d_added, sums.sum(0).to(weight.dtype)


def _fake_gradients(
    d_sum: Tensor | None, d_y: Tensor, normed: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    other = added_dtype is not None and added_dtype != x_dtype
    d_added = normed.new_empty(normed.shape if other else (0,), dtype=added_dtype or x_dtype)
    return normed.new_empty(normed.shape, dtype=x_dtype), d_added, weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, d_y: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    d_x, _, d_weight = _gradient_operator(None, d_y, x, weight, ctx.eps, x.dtype, None)
    return d_x, d_weight, None, None


def _setup_with_sum(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, added, weight, ctx.eps, _ = inputs
    ctx.dtypes = x.dtype, added.dtype
    ctx.save_for_backward(output[0], weight)


def _backward_with_sum(ctx: Any, d_sum: Tensor, d_y: Tensor) -> tuple:
    total, weight = ctx.saved_tensors
    d_x, d_added, d_weight = _gradient_operator(d_sum, d_y, total, weight, ctx.eps, *ctx.dtypes)
    return d_x, d_x if ctx.dtypes[0] == ctx.dtypes[1] else d_added, d_weight, None, None


_alone = Operator("rms_norm", _run, _fake, _setup, _backward)
_with_sum = Operator("add_rms_norm", _run_with_sum, _fake_with_sum, _setup_with_sum, _backward_with_sum)
_gradient_operator = Operator("rms_norm_backward", _gradients, _fake_gradients)
