"""Gates in one pass each: log gates of a narrow projection (its second linear layer included), and SwiGLU.

Letters: R width of the narrow projection, G gates, I width of SwiGLU's halves; leading sizes are free, T is their product.

Notable choices: log gates are fp32 whatever comes in; the logits are never stored.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from foveal.kernels.token_mixing import dispatch, reference
from foveal.kernels.token_mixing.launching import Form, Operator, ceil

GATE_TILE = (
    64,
    64,
)  # tokens, gates: of five on an H100 the fastest, 26 us for 65,536 tokens and 192 gates (PyTorch takes 135)
SWIGLU_TILE = (4, 512)  # tokens, channels: 70 us for 65,536 tokens, I = 512, as every tile tried; PyTorch takes 194


def log_gates(
    narrow: Tensor, weight: Tensor, bias: Tensor | None = None, temper: float = 16.0, *, implementation: str | None = None
) -> Tensor:  # fmt: skip
    """``logsigmoid(narrow weight^T + bias) / temper``. narrow [.., R], weight [G, R], bias [G] -> [.., G] in fp32 (fp64 stays).

    Differentiable. ValueError where the weight does not fit.
    """
    if weight.ndim != 2 or weight.shape[1] != narrow.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit {narrow.shape[-1]} channels; it is [G, {narrow.shape[-1]}]."
        )
    if not dispatch.fused(implementation, narrow, weight, bias):
        return reference.log_gates(narrow, weight, bias, temper)
    return _gates_operator(narrow, weight, bias, temper)


def swiglu(joint: Tensor, *, implementation: str | None = None) -> Tensor:
    """``silu(a) * b`` of joint [.., 2 I] = [a, b] -> [.., I]. Differentiable."""
    if joint.shape[-1] % 2:
        raise ValueError(
            f"SwiGLU halves {joint.shape[-1]} channels, an odd number; pass both halves beside each other."
        )
    if not dispatch.fused(implementation, joint):
        return reference.swiglu(joint)
    return _swiglu_operator(joint)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=256)
def _gates_form(width: int, gates: int, bias: bool, grad: bool, full: bool) -> Form:
    from foveal.kernels.token_mixing.gating_kernels import narrow_log_gates

    tile = {
        "R": width,
        "RP": max(16, 1 << (width - 1).bit_length()),
        "G": gates,
        "BT": GATE_TILE[0],
        "BG": GATE_TILE[1],
    }
    product = "tf32x3" if full else "ieee"
    return Form(narrow_log_gates, tile | {"HAS_BIAS": bias, "HAS_GRAD": grad, "PRODUCT": product}, num_warps=4)


def _gated(
    narrow: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, temper: float
) -> tuple[Tensor, Tensor]:
    """Log gates in fp32; or the gradient of the logits in narrow's dtype, and of the bias in fp32 (of no meaning otherwise)."""
    rows, (gates, width) = _rows(narrow), weight.shape
    y = torch.empty(
        (*narrow.shape[:-1], gates), dtype=torch.float32 if grad is None else narrow.dtype, device=narrow.device
    )
    tiles = ceil(rows.shape[0], GATE_TILE[0])
    sums = y if grad is None else torch.empty((tiles, gates), dtype=torch.float32, device=narrow.device)
    if y.numel():
        form = _gates_form(width, gates, bias is not None, grad is not None, narrow.dtype == torch.float32)
        tensors = (rows, weight.contiguous(), weight if bias is None else bias, y if grad is None else grad, y, sums)
        form(tiles * ceil(gates, GATE_TILE[1]), tensors, (rows.stride(0),), (rows.shape[0],), (1.0 / temper,))
    return y, sums if grad is None else sums.sum(0)


def gates_into(y: Tensor, narrow: Tensor, weight: Tensor, bias: Tensor, temper: float) -> None:
    """y [B, N, G] fp32 = log gates of narrow [B, N, R] with even rows; no check is made."""
    b, n, gates = y.shape
    form = _gates_form(narrow.shape[2], gates, True, False, narrow.dtype == torch.float32)
    programs = ceil(b * n, GATE_TILE[0]) * ceil(gates, GATE_TILE[1])
    form(programs, (narrow, weight, bias, y, y, y), (narrow.stride(1),), (b * n,), (1.0 / temper,))


def _gates(narrow: Tensor, weight: Tensor, bias: Tensor | None, temper: float) -> Tensor:
    return _gated(narrow, weight, bias, None, temper)[0]


def _fake_gates(narrow: Tensor, weight: Tensor, bias: Tensor | None, temper: float) -> Tensor:
    return narrow.new_empty((*narrow.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _logit_gradients(
    grad: Tensor, narrow: Tensor, weight: Tensor, bias: Tensor | None, temper: float
) -> tuple[Tensor, Tensor]:
    return _gated(narrow, weight, bias, grad.contiguous(), temper)


def _fake_logit_gradients(
    grad: Tensor, narrow: Tensor, weight: Tensor, bias: Tensor | None, temper: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return narrow.new_empty(grad.shape), grad.new_empty(grad.shape[-1:], dtype=torch.float32)


def _gates_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.temper = inputs
    ctx.save_for_backward(*tensors)


def _gates_backward(ctx: Any, grad: Tensor) -> tuple:
    narrow, weight, bias = ctx.saved_tensors
    grad, d_bias = _logit_operator(grad, narrow, weight, bias, ctx.temper)
    grad = grad.flatten(0, -2)
    d_narrow = (grad @ weight.to(grad.dtype)).view(narrow.shape)
    d_weight = (grad.mT @ narrow.reshape(-1, narrow.shape[-1])).to(weight.dtype)
    return d_narrow, d_weight, None if bias is None else d_bias.to(bias.dtype), None


_gates_operator = Operator("log_gates", _gates, _fake_gates, _gates_setup, _gates_backward)
_logit_operator = Operator("log_gates_backward", _logit_gradients, _fake_logit_gradients)


def _swiglu_tile(width: int) -> dict[str, int]:
    channels = min(SWIGLU_TILE[1], 1 << (width - 1).bit_length())
    return {"I": width, "BT": SWIGLU_TILE[0] * SWIGLU_TILE[1] // channels, "BI": channels}


@functools.lru_cache(maxsize=256)
def _swiglu_form(width: int, backward: bool) -> Form:
    from foveal.kernels.token_mixing.gating_kernels import swiglu_backward, swiglu_forward

    return Form(swiglu_backward if backward else swiglu_forward, _swiglu_tile(width), num_warps=4)


def _activated(joint: Tensor, grad: Tensor | None) -> Tensor:
    """Half as wide as joint; or the gradient of joint."""
    rows, width = _rows(joint), joint.shape[-1] // 2
    made = torch.empty(
        (*joint.shape[:-1], width) if grad is None else joint.shape, dtype=joint.dtype, device=joint.device
    )
    if made.numel():
        form = _swiglu_form(width, grad is not None)
        programs = ceil(rows.shape[0], form.constants["BT"]) * ceil(width, form.constants["BI"])
        form(programs, (rows, made) if grad is None else (rows, grad, made), (rows.stride(0),), (rows.shape[0],))
    return made


def _swiglu(joint: Tensor) -> Tensor:
    return _activated(joint, None)


def _fake_swiglu(joint: Tensor) -> Tensor:
    return joint.new_empty((*joint.shape[:-1], joint.shape[-1] // 2))


def _swiglu_gradient(grad: Tensor, joint: Tensor) -> Tensor:
    return _activated(joint, grad.contiguous())


def _fake_swiglu_gradient(grad: Tensor, joint: Tensor) -> Tensor:
    return joint.new_empty(joint.shape)


def _swiglu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_gradient_operator(grad, *ctx.saved_tensors)


_swiglu_operator = Operator("swiglu", _swiglu, _fake_swiglu, _swiglu_setup, _swiglu_backward)
_swiglu_gradient_operator = Operator("swiglu_backward", _swiglu_gradient, _fake_swiglu_gradient)
