"""Norm, rotation and token order of queries and keys in plain PyTorch: what the kernel computes, rounded where it rounds.

Letters: B batch, H heads, N tokens, D head dim, P places in the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.query_key.parts import Norm, Rotation


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x [B, N, H, D] -> the same shape and dtype; at least fp32 inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = (2, 3) if norm.across else (3,)
    y = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + norm.eps)
    if norm.twice:
        y = y.to(x.dtype)
    if norm.weight is not None:
        y = y * norm.weight.view(x.shape[2:] if norm.across else (x.shape[3],)).to(y.dtype)
    return y.to(x.dtype)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, N, H, D] -> the same shape and dtype; at least fp32 inside."""
    cos, sin = (t[None, :, None, :] for t in (rotation.cos, rotation.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    cos_even, cos_odd, sin_even, sin_odd = cos[..., 0::2], cos[..., 1::2], sin[..., 0::2], sin[..., 1::2]
    if rotation.shared:
        cos_odd, sin_even = cos_even, sin_odd
    return (
        torch.stack((even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd), dim=-1).flatten(3).to(x.dtype)
    )


def finished(x: Tensor, norm: Norm, rotation: Rotation | None, order: Tensor | None) -> Tensor:
    """x [B, N, H, D] -> [B, P, H, D]"""
    y = normed(x, norm)
    y = y if rotation is None else rotated(y, rotation)
    return y if order is None else y.index_select(1, order)
