"""The operator that stands for a bound layer in a compiled graph.

* It takes the layer's ticket as a 0-d CPU tensor: a number in traced code would compile once per layer, and again at every step.
* Inside, the layer runs as it does without a compiler: same method, same state, same record.
* Its backward computes the call again with gradients, as gradient checkpointing does; state and record stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.plugins.diffusers_host.layer import LIVE, Core


@torch.library.custom_op("foveal::attend_in_layer", mutates_args=())
def attend_in_graph(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool
) -> Tensor:
    """q [B, N, H, D], k, v [B, M, Hkv, D], mask as scaled_dot_product_attention takes it -> contiguous [B, N, H, D]"""
    return LIVE[int(ticket)].attend(Core(q, k, v, mask, scale, gqa)).contiguous()


@attend_in_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool) -> Tensor:
    return q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ticket, ctx.scale, ctx.gqa = inputs
    ctx.save_for_backward(q, k, v, mask, ticket)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, ticket = ctx.saved_tensors
    grads = attend_backward(grad, q, k, v, mask, ticket, ctx.scale, ctx.gqa)
    return (*grads, None, None, None, None)


attend_in_graph.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("foveal::attend_in_layer_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous."""
    with _autograd_inside_an_operator(), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = LIVE[int(ticket)].attend(Core(q, k, v, mask, scale, gqa))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _autograd_inside_an_operator() -> Any:
    """Operators run below autograd; this lets one differentiate inside itself."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(include, exclude)
