"""The operator that stands for an accelerated layer in a compiled graph (``foveal.plugins.in_graphs`` says what it may rely on).

Letters: B batch, H heads, Hkv key heads, N tokens, D head dim.

* Where blocks are compiled one by one, the root has run outside and knows the call; where the whole model is one graph, rows,
  columns and prefix come with the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.plugins.in_graphs import differentiate, gradients, layers_of
from foveal.plugins.timm_host.frame import Frame, Group
from foveal.plugins.timm_host.restated import Core, dense


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]
) -> Tensor:
    core = Core(q, k, v, mask, scale)
    traced = Frame((Group((plane[0], plane[1])),), plane[2]) if plane else None
    (layer,) = layers_of(ticket)
    out = layer.attend(core, traced)
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


@torch.library.custom_op("foveal::attend_in_vit_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float, plane: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, N, H, D] -> gradients of q, k, v, contiguous"""
    return gradients(lambda q, k, v: _attend(q, k, v, mask, ticket, scale, plane), q, k, v, grad.transpose(1, 2))


differentiate(attend_in_graph, attend_backward)
