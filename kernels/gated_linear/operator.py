"""The ``torch.library`` operators behind the Triton implementation: for compiled graphs and for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.gated_linear import portable_call


def fused(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, state: Tensor | None, scale: float, need_state: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in chunked.py. The state is empty unless asked for. Without gradients and compilers the operator is passed by."""
    inputs = (q, k, v, forward, backward, state)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if learns or torch.compiler.is_compiling():
        return _operator(*inputs, scale, need_state)
    return _run(*inputs, scale, need_state)


def _run(q, k, v, forward, backward, state, scale, need_state) -> tuple[Tensor, Tensor]:
    out, last = portable_call.forward(portable_call.job_of(q, k, v, (forward, backward), scale), state, need_state)
    return out, q.new_empty(0, dtype=torch.float32) if last is None else last


@torch.library.custom_op("foveal::gated_linear_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, state: Tensor | None, scale: float, need_state: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run(q, k, v, forward, backward, state, scale, need_state)


@_operator.register_fake
def _(q, k, v, forward, backward, state, scale, need_state):
    shape = (*q.shape[:2], q.shape[3], v.shape[3]) if need_state else (0,)
    return torch.empty_like(v), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("foveal::gated_linear_attention_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, d_last: Tensor | None, q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None,
    state: Tensor | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    job = portable_call.job_of(q, k, v, (forward, backward), scale, backward=True)
    return [x for x in portable_call.backward(job, d_out, state, d_last) if x is not None]


@_backward_operator.register_fake
def _(d_out, d_last, q, k, v, forward, backward, state, scale):
    made = [torch.empty_like(x) for x in (q, k, v, forward, backward) if x is not None]
    return made if state is None else [*made, state.new_empty(state.shape)]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.need_state = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    grads = iter(_backward_operator(d_out, d_last if ctx.need_state else None, *tensors, ctx.scale))
    return *(None if x is None else next(grads) for x in tensors), None, None


_operator.register_autograd(_backward, setup_context=_setup)
