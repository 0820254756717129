"""The operator that stands for an accelerated layer in a compiled graph.

Letters: B batch, H heads, Hkv key heads, N tokens, D head dim.

* It takes the layer's ticket as a 0-d CPU tensor: a number in traced code would compile once per layer.
* Inside, the layer runs as it does without a compiler. Where blocks are compiled one by one, the root has run outside and knows the
  call; where the whole model is one graph, rows, columns and prefix come with the operator.
* Its backward computes the call again with gradients, as gradient checkpointing does; state and record stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.plugins.timm_host.frame import Frame, Group
from foveal.plugins.timm_host.layer import LIVE
from foveal.plugins.timm_host.restated import Core, dense


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]
) -> Tensor:
    core = Core(q, k, v, mask, scale)
    traced = Frame((Group((plane[0], plane[1])),), plane[2]) if plane else None
    out = LIVE[int(ticket)].attend(core, traced)
    return dense(core) if out is None else out


@torch.library.custom_op("foveal::attend_in_vit", mutates_args=())
def attend_in_graph(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]
) -> Tensor:
    """q [B, H, N, D], k, v [B, Hkv, N, D], plane: rows, columns, prefix, or empty -> contiguous [B, N, H, D]"""
    return _attend(q, k, v, mask, ticket, scale, plane).transpose(1, 2).contiguous()


@attend_in_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ticket, ctx.scale, ctx.plane = inputs
    ctx.save_for_backward(q, k, v, mask, ticket)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, ticket = ctx.saved_tensors
    grads = attend_backward(grad, q, k, v, mask, ticket, ctx.scale, ctx.plane)
    return (*grads, None, None, None, None)


attend_in_graph.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("foveal::attend_in_vit_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, N, H, D] -> gradients of q, k, v, contiguous"""
    with _autograd_inside_an_operator(), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = _attend(q, k, v, mask, ticket, scale, plane)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))
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
