"""Pooled statistics of blocks of tokens: mean, and on request the variance per channel and the self-similarity.

Letters: B batch, H heads, N tokens, P plan positions, C blocks, D head dim. Blocks are runs of plan positions, as in a plan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockStatistics(NamedTuple):
    """mean [B, H, C, D] fp32; n [B, H, C] fp32, tokens behind it, padding not counted; var [B, H, C, D] fp32 or None; likeness [B, H, C] fp32 or None.

    var is the mean squared distance from the mean, per channel. likeness is the mean cosine between two tokens of the block, itself
    included: the squared length of the mean of the unit vectors (SpargeAttn's self-similarity). An empty block is all zeros.
    """

    mean: Tensor
    n: Tensor
    var: Tensor | None = None
    likeness: Tensor | None = None


def pool_blocks(
    x: Tensor, start: Tensor, length: Tensor, order: Tensor | None = None, *, max_length: int | None = None,
    variance: bool = False, likeness: bool = False,
) -> BlockStatistics:  # fmt: skip
    """Pool x [B, H, N, D] over blocks.

    start, length   int32 [C], [B or 1, H or 1, C]: runs of plan positions; length 0 is legal
    order           int [P] or [B, H, P] as in a plan: position p holds token order[p]; None: positions are tokens
    max_length      longest block, a host number: without it the device is waited for once

    -> BlockStatistics, fp32. No gradient. Triton on a GPU (fp16, bf16, fp32), else PyTorch.
    Raises ValueError when a block reaches past the sequence on the CPU (on a GPU lengths are trusted).
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; [batch, heads, tokens, head_dim] is needed.")
    start, length = (t.reshape(*([1] * (3 - t.ndim)), *t.shape) for t in (start, length))
    positions = x.shape[2] if order is None else order.shape[-1]
    if not x.is_cuda and start.numel() and int((start + length).max()) > positions:
        raise ValueError(
            f"a block ends at position {int((start + length).max())}, the sequence has {positions}; shorten the last block."
        )
    longest = int(length.max()) if max_length is None and length.numel() else (max_length or 0)
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        from foveal.kernels.selection.portable import pool_rows

        return BlockStatistics(*pool_rows(x.detach(), start, length, order, longest, variance, likeness))
    return _pooled(x.detach(), start, length, order, longest, variance, likeness)


def _pooled(
    x: Tensor, start: Tensor, length: Tensor, order: Tensor | None, longest: int, variance: bool, likeness: bool
) -> BlockStatistics:
    b, h, _, d = x.shape
    step = torch.arange(longest, device=x.device)
    inside = (step < length[..., None]).expand(b, h, -1, -1)  # [B, H, C, L]
    index = torch.where(inside, start[..., None] + step, 0).long()
    if order is not None:
        index = order.expand(b, h, -1).gather(2, index.flatten(2)).view(index.shape).long()
        inside = inside & (index >= 0)
    rows = x.gather(2, index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, d)).unflatten(2, index.shape[2:])
    rows = rows.float() * inside[..., None]
    n = inside.sum(3).float()
    some = n.clamp(min=1)[..., None]
    mean = rows.sum(3) / some
    var = like = None
    if variance:
        var = ((rows - mean[:, :, :, None]) * inside[..., None]).square().sum(3) / some
    if likeness:
        unit = torch.nn.functional.normalize(rows, dim=-1, eps=1e-12)
        like = (unit.sum(3) / some).square().sum(-1)
    return BlockStatistics(mean, n, var, like)
