"""Learned positions for any grid."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def resample(positions: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """positions [1, N, D] of a grid -> [1, height * width, D]: bicubic, in fp32. The same grid: the positions themselves."""
    if (height, width) == tuple(grid):
        return positions
    square = positions.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(height, width), mode="bicubic", align_corners=False)
    return square.flatten(2).transpose(1, 2).to(positions.dtype)
