"""Token order at the speed of memory: gather rows of [B, H, N, D] by an index.

Letters: B batch, H heads, N tokens, P plan positions, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, N, D], order int [P] or [B, H, P] with -1 for padding (which takes row 0) -> [B, H, P, D]; tokens whose heads lie together stay so.

    Triton on NVIDIA devices, PyTorch elsewhere; the result is the same to the bit.
    """
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        try:
            from foveal.kernels.order_kernel import permute_rows
        except ImportError:  # no triton in this installation
            pass
        else:
            return permute_rows(x, order)
    index = order.clamp(min=0).long()
    if index.ndim == 1:
        return x.index_select(2, index)
    return x.gather(2, index.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[-1]))
