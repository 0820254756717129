"""Token order: gather rows of [B, H, N, D] by an index.

Letters: B batch, H heads, N tokens, P plan positions, D head dim. An order is int [P] or [B, H, P]; -1 is padding, takes row 0,
and is masked elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, N, D] in that order -> [B, H, P, D]. PyTorch, differentiable, any device. None: x itself."""
    if order is None:
        return x
    index = order.clamp(min=0).long()
    if index.ndim == 1:
        return x.index_select(2, index)
    return x.gather(2, index.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[-1]))


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The same to the bit at the speed of memory, for calls that run on Triton; tokens whose heads lie together stay so."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        from foveal.kernels.order_kernel import permute_rows

        return permute_rows(x, order)
    return take_tokens(x, order)
