"""The ``torch.library`` operators behind linear attention's Triton implementation. Letters as in plain_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from foveal.kernels.gated_linear import plain_call
from foveal.kernels.gated_linear.plain_gradients import key_gradients, query_gradients


def fused(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, added: Tensor | None, divide: bool, scale: float,
    eps: float,
) -> tuple[Tensor, plain_call.Steps | None]:  # fmt: skip
    """-> out, and what gives it again. Without gradients and compilers the operator is passed by."""
    inputs = (q, k, v, key_gate, value_gate, added)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if learns or torch.compiler.is_compiling():
        return _operator(*inputs, divide, scale, eps)[0], None
    out = plain_call.forward(*inputs, divide, scale, eps)[0]
    return out, plain_call.steps_of(*inputs, out, divide, scale, eps)


@torch.library.custom_op("foveal::linear_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, added: Tensor | None, divide: bool, scale: float,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """-> out, and the sums for the backward."""
    return list(plain_call.forward(q, k, v, key_gate, value_gate, added, divide, scale, eps))


@_operator.register_fake
def _(q, k, v, key_gate, value_gate, added, divide, scale, eps):
    heads, keys, values = q.shape[0] * q.shape[1], q.shape[-1], v.shape[-1]
    pairs = q.new_empty((heads, keys, values), dtype=plain_call.sum_dtype(q.dtype))
    return [torch.empty_like(v), pairs, q.new_empty(heads * (keys if divide else keys + values), dtype=torch.float32)]


@torch.library.custom_op("foveal::linear_attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor | None, value_gate: Tensor | None, pairs: Tensor, means: Tensor,
    divide: bool, scale: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    shape, n, add = plain_call.shape_of(q.shape[-1], v.shape[-1], q.dtype), q.shape[2], eps if divide else 0.0
    grid = q.shape[0] * q.shape[1], triton.cdiv(n, shape.tokens)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    switches = shape.switches(q.shape[-1], v.shape[-1], q.dtype) | {
        "ALIGN": plain_call.alignment(q, k, v, d_out, dq, dk, dv)
    }
    outer, along, rest = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))
    query_gradients[grid](
        q, d_out, pairs, means, dq, outer, along, rest, *q.stride(), *d_out.stride(), *dq.stride(), scale, eps, n, q.shape[1],
        DIVIDE=divide, **switches,
    )  # fmt: skip
    totals = plain_call.sums(q, d_out, None, outer[..., None], add, 1.0, not divide, (along, rest))
    d_gates = [None if g is None else q.new_empty(q.shape[:3], dtype=torch.float32) for g in (key_gate, value_gate)]
    gates = [k if g is None else g for g in (key_gate, value_gate)]
    key_gradients[grid](
        k, v, *gates, *totals, dk, dv, *(outer if g is None else g for g in d_gates), *k.stride(), *v.stride(),
        *(s for g in (key_gate, value_gate) for s in ((0, 0, 0) if g is None else g.stride()[:3])), *dk.stride(), *dv.stride(),
        1 / n, add, n, q.shape[1], HAS_KG=key_gate is not None, HAS_VG=value_gate is not None, MEANS=not divide, **switches,
    )  # fmt: skip
    named = zip(d_gates, (key_gate, value_gate), strict=True)
    return [dq, dk, dv, *(g[..., None].to(to.dtype) for g, to in named if g is not None and to is not None)]


@_backward_operator.register_fake
def _(d_out, q, k, v, key_gate, value_gate, pairs, means, divide, scale, eps):
    made = [torch.empty_like(x) for x in (q, k, v)]
    return made + [x.new_empty(x.shape) for x in (key_gate, value_gate) if x is not None]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, added, ctx.divide, ctx.scale, ctx.eps = inputs
    ctx.added = None if added is None else (added.shape[2], added.dtype)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    *tensors, pairs, means = ctx.saved_tensors
    made = iter(_backward_operator(grads[0], *tensors, pairs, means, ctx.divide, ctx.scale, ctx.eps))
    d_added = None if ctx.added is None else grads[0][:, :, grads[0].shape[2] - ctx.added[0] :].to(ctx.added[1])
    return *(None if x is None else next(made) for x in tensors), d_added, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
