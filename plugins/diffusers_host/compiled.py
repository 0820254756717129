"""The operator that stands for a bound layer in a compiled graph (``foveal.plugins.in_graphs`` says what it may rely on).

Letters: B batch, H heads, Hkv key heads, N query tokens, M key tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.plugins.diffusers_host.layer import Core
from foveal.plugins.in_graphs import differentiate, gradients, layers_of


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool
) -> Tensor:
    (layer,) = layers_of(ticket)
    return layer.attend(Core(q, k, v, mask, scale, gqa))


@torch.library.custom_op("foveal::attend_in_layer", mutates_args=())
def attend_in_graph(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool
) -> Tensor:
    """q [B, N, H, D], k, v [B, M, Hkv, D], mask as scaled_dot_product_attention takes it -> contiguous [B, N, H, D]"""
    return _attend(q, k, v, mask, ticket, scale, gqa).contiguous()


@attend_in_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("foveal::attend_in_layer_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, scale: float | None, gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous."""
    return gradients(lambda q, k, v: _attend(q, k, v, mask, ticket, scale, gqa), q, k, v, grad)


differentiate(attend_in_graph, attend_backward)
