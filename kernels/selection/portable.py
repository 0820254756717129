"""The same in Triton: pooling at the speed of memory, and lists by compaction. One program per block, or per row of lists.

Letters as in pooling.py and lists.py; DP head dim padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens taken at once (118,784 x 24 x 128 in bf16 on one H100: 287 us; 64, summed in every step: 317 us)
COLUMNS = 1024  # blocks of a row taken at once


@triton.jit
def rows_at(base, order, positions, inside, dims, x_n, x_d, D: tl.constexpr, ORDER: tl.constexpr):
    """Tokens at plan positions, fp32; padding (-1) and what lies outside are 0. -> [ROWS, DP], bool [ROWS]"""
    if ORDER:
        token = tl.load(order + positions, mask=inside, other=-1).to(tl.int64)
        ok = inside & (token >= 0)
    else:
        token = positions.to(tl.int64)
        ok = inside
    at = base + token[:, None] * x_n + dims[None, :] * x_d
    return tl.load(at, mask=ok[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32), ok


@triton.jit
def pool_kernel(
    X, Order, Start, Length, Mean, N, Var, Like,
    x_b, x_h, x_n, x_d, o_b, o_h, s_b, s_h, l_b, l_h, H, HEADS, C,
    D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, VAR: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    # Heads first: where they lie beside each other, programs that run together read whole rows.
    c, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    b, h = head // H, head % H
    start, length = tl.load(Start + b * s_b + h * s_h + c), tl.load(Length + b * l_b + h * l_h + c)
    dims, step = tl.arange(0, DP), tl.arange(0, STEP)
    base, order = X + b * x_b + h * x_h, Order + b * o_b + h * o_h
    total = tl.zeros([STEP, DP], tl.float32)
    unit = tl.zeros([DP], tl.float32)
    n = tl.sum(tl.zeros([STEP], tl.int32), 0)
    for first in range(0, length, STEP):
        x, ok = rows_at(base, order, start + first + step, first + step < length, dims, x_n, x_d, D, ORDER)
        total += x
        n += tl.sum(ok.to(tl.int32), 0)
        if LIKE:
            unit += tl.sum(x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None], 0)
    some = tl.maximum(n, 1).to(tl.float32)
    mean = tl.sum(total, 0) / some
    to = (head * C + c) * D + dims
    tl.store(Mean + to, mean, mask=dims < D)
    tl.store(N + head * C + c, n.to(tl.float32))
    if LIKE:
        tl.store(Like + head * C + c, tl.sum(unit * unit, 0) / (some * some))
    if VAR:  # a second pass over what the caches still hold: exact where the mean is large
        spread = tl.zeros([DP], tl.float32)
        for first in range(0, length, STEP):
            x, ok = rows_at(base, order, start + first + step, first + step < length, dims, x_n, x_d, D, ORDER)
            away = tl.where(ok[:, None], x - mean[None, :], 0.0)
            spread += tl.sum(away * away, 0)
        tl.store(Var + to, spread / some, mask=dims < D)


def pool_rows(
    x: Tensor, start: Tensor, length: Tensor, order: Tensor | None, longest: int, variance: bool, likeness: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> mean, n, var, likeness as in ``pool_blocks``"""
    b, h, _, d = x.shape
    c = start.shape[-1]
    mean = torch.empty(b, h, c, d, device=x.device)
    n = torch.empty(b, h, c, device=x.device)
    var = torch.empty_like(mean) if variance else None
    like = torch.empty(b, h, c, device=x.device) if likeness else None
    width = triton.next_power_of_2(d)
    step = min(ROWS, max(1, triton.next_power_of_2(max(1, longest))))
    if c:
        pool_kernel[(c * b * h,)](
            x, start if order is None else order, start, length, mean, n, mean if var is None else var, mean if like is None else like,
            *x.stride(), *_lead(order), *_lead(start), *_lead(length), h, b * h, c, D=d, DP=width, STEP=step, ORDER=order is not None,
            VAR=variance, LIKE=likeness, num_warps=4,
        )  # fmt: skip
    return mean, n, var, like


def _lead(x: Tensor | None) -> tuple[int, int]:
    """Strides over batch and heads, 0 where shared."""
    if x is None or x.ndim == 1:
        return 0, 0
    return (0 if x.shape[0] == 1 else x.stride(0)), (0 if x.shape[1] == 1 else x.stride(1))


@triton.jit
def compact_kernel(Keep, Index, Count, C, K, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, STEP)
    seen = 0
    for first in range(0, C, STEP):
        c = first + step
        keep = tl.load(Keep + row * C + c, mask=c < C, other=0).to(tl.int32)
        place = seen + tl.cumsum(keep, 0) - keep
        tl.store(Index + row * K + place, c, mask=(keep != 0) & (place < K))
        seen += tl.sum(keep, 0)
    tl.store(Count + row, tl.minimum(seen, K))


def compact(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """keep bool [B, H, R, C] -> count int32 [B, H, R], index int32 [B, H, R, width] in address order"""
    keep = keep.contiguous()
    count = torch.empty(keep.shape[:-1], dtype=torch.int32, device=keep.device)
    index = torch.zeros(*keep.shape[:-1], width, dtype=torch.int32, device=keep.device)
    if count.numel():
        step = min(COLUMNS, triton.next_power_of_2(max(1, keep.shape[-1])))
        compact_kernel[(count.numel(),)](keep.view(torch.uint8), index, count, keep.shape[-1], width, STEP=step)
    return count, index
