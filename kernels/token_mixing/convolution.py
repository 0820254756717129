"""Depth-wise convolution of tokens that lie on a grid, without turning them into maps and back.

Letters: B batch, N = height * width tokens, D channels, K kernel size.

Notable choices: products and sums are fp32, whatever the dtypes; under autocast the output has autocast's dtype and nothing is cast before.
The weights' gradient is made of partial sums in a fixed order: every run gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.token_mixing import dispatch, reference
from foveal.kernels.token_mixing.launching import Form, Operator, ceil, shared

# Of a strip. Of ten tiles the fastest 3 x 3 on an H100: 30 us for 65,536 tokens of 192 channels in bf16 (a copy takes 18, cuDNN 46).
ROWS, COLUMNS, CHANNELS = 8, 16, 64
WARPS, GRADIENT_WARPS, WIDE_WARPS = (
    2,
    4,
    8,
)  # for K = 3, its activation's gradient, and larger K: registers would spill with fewer
PARTS, TOKENS = 132, 16  # partial sums of the weights' gradient, at most; tokens added at a time


def depthwise_conv(
    tokens: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None = None, silu: bool = False, *, implementation: str | None = None
) -> Tensor:  # fmt: skip
    """A K x K convolution of every channel with its own kernel, zeros outside, then SiLU if asked for.

    tokens    [B, N, D], row by row; a view with any strides but the last, which is 1 (else it is copied): ``x[:, prefix:]``
    grid      (height, width), height * width = N
    weight    [D, 1, K, K], K odd (that of ``nn.Conv2d(D, D, K, padding=K // 2, groups=D)``); bias [D]
    -> [B, N, D], contiguous, in tokens' dtype or autocast's. Differentiable. ValueError in one sentence for shapes that do not fit.
    """
    _check(tokens, grid, weight, bias)
    dtype = dispatch.product_dtype(tokens)
    if not dispatch.fused(implementation, tokens, weight, bias):
        return reference.depthwise_conv(tokens, grid, weight, bias, silu, dtype)
    return _operator(tokens, weight, bias, grid[0], grid[1], silu, dtype)


def _check(tokens: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None) -> None:
    d, k = tokens.shape[-1], weight.shape[-1]
    if tokens.ndim != 3 or grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} do not lie on a grid of {grid[0]} by {grid[1]}; pass [B, height * width, D]."
        )
    if weight.shape != (d, 1, k, k) or k % 2 == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; {d} channels need [{d}, 1, K, K] with K odd.")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias is {tuple(bias.shape)}; {d} channels need [{d}].")


def _run(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, silu: bool, dtype: torch.dtype
) -> Tensor:
    return _convolved(tokens, weight, bias, None, (height, width), silu, False, dtype)


@functools.lru_cache(maxsize=256)
def _form(d: int, size: int, silu: bool, bias: bool, grad: bool, reverse: bool) -> Form:
    from foveal.kernels.token_mixing.convolution_kernels import convolve

    tile = {"D": d, "K": size, "R": ROWS, "BW": COLUMNS, "BD": CHANNELS}
    warps = WIDE_WARPS if size > 3 else GRADIENT_WARPS if grad else WARPS
    return Form(
        convolve, tile | {"SILU": silu, "HAS_BIAS": bias, "HAS_GRAD": grad, "REVERSED": reverse}, num_warps=warps
    )


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, grid: tuple[int, int], silu: bool, reverse: bool, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    b, n, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty((b, n, d), dtype=dtype, device=x.device)
    if y.numel():
        weight = weight.contiguous()
        programs = b * ceil(grid[0], ROWS) * ceil(grid[1], COLUMNS) * ceil(d, CHANNELS)
        form = _form(d, weight.shape[-1], silu, bias is not None, grad is not None, reverse)
        form(
            programs,
            (x, weight, weight if bias is None else bias, x if grad is None else grad, y),
            x.stride()[:2],
            grid,
        )
    return y


def convolve_into(y: Tensor, x: Tensor, weight: Tensor, height: int, width: int, silu: bool) -> None:
    """y = act(x * weight), all contiguous; no check is made."""
    b, n, d = x.shape
    programs = b * ceil(height, ROWS) * ceil(width, COLUMNS) * ceil(d, CHANNELS)
    form = _form(d, weight.shape[-1], silu, False, False, False)
    form(programs, (x, weight, weight, x, y), (n * d, d), (height, width))


@functools.lru_cache(maxsize=256)
def _gradient_form(d: int, size: int, bias: bool) -> Form:
    from foveal.kernels.token_mixing.convolution_kernels import weight_gradients

    tile = {"D": d, "K": size, "ROWS": size if size <= 3 else 1, "BP": TOKENS, "BD": CHANNELS}
    return Form(weight_gradients, tile | {"HAS_BIAS": bias}, num_warps=4)


def _weight_gradients(
    x: Tensor, grad: Tensor, grid: tuple[int, int], size: int, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of the weight [D, K * K] and of the bias [D], fp32."""
    b, n, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    parts, per = shared(b * n, PARTS, TOKENS)
    sums = torch.empty(parts, d, size * size, dtype=torch.float32, device=x.device)
    every = torch.empty(parts, d, dtype=torch.float32, device=x.device)
    groups = 1 if size <= 3 else size
    form = _gradient_form(d, size, need_bias)
    form(parts * ceil(d, CHANNELS) * groups, (x, grad, sums, every), x.stride()[:2], (b * n, n, *grid, per))
    return sums.sum(0), every.sum(0) if need_bias else every[0]


def _fake(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, silu: bool, dtype: torch.dtype
) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=dtype)


def _gradients(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of tokens, weight and bias (of no meaning without one)."""
    grid, grad = (height, width), grad.contiguous()
    if silu:
        grad = _convolved(tokens, weight, bias, grad, grid, True, False, grad.dtype)
    d_tokens = _convolved(grad, weight, None, None, grid, False, True, tokens.dtype)
    d_weight, d_bias = _weight_gradients(tokens, grad, grid, weight.shape[-1], bias is not None)
    return (
        d_tokens,
        d_weight.view(weight.shape).to(weight.dtype),
        d_bias.to(weight.dtype if bias is None else bias.dtype),
    )


def _fake_gradients(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)
    return *made, weight.new_empty(weight.shape[:1], dtype=None if bias is None else bias.dtype)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, weight, bias, ctx.height, ctx.width, ctx.silu, _ = inputs
    ctx.save_for_backward(tokens, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    tokens, weight, bias = ctx.saved_tensors
    d_tokens, d_weight, d_bias = _gradient_operator(grad, tokens, weight, bias, ctx.height, ctx.width, ctx.silu)
    return d_tokens, d_weight, None if bias is None else d_bias, None, None, None, None


_operator = Operator("depthwise_conv", _run, _fake, _setup, _backward)
_gradient_operator = Operator("depthwise_conv_backward", _gradients, _fake_gradients)
