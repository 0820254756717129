"""Gathering rows with Triton: whole rows of D values, neighbouring rows in one program, int64 addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_ROW = 8192  # values of one row in one program


@triton.jit
def gather_rows(X, Order, Y, x_b, x_h, x_n, x_d, o_b, o_h, H, P, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = p < P
    rows = tl.maximum(tl.load(Order + b * o_b + h * o_h + p, mask=inside, other=0), 0).to(tl.int64)
    ok = inside[:, None] & (d < D)[None, :]
    x = tl.load(X + b * x_b + h * x_h + rows[:, None] * x_n + d[None, :] * x_d, mask=ok)
    tl.store(Y + (tl.program_id(1).to(tl.int64) * P + p.to(tl.int64))[:, None] * D + d[None, :], x, mask=ok)


def permute_rows(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, N, D] -> [B, H, P, D]. Where the heads of a token lie together, a token is one long row and stays so."""
    b, h, _, d = x.shape
    together = order.ndim == 1 and x.stride(3) == 1 and x.stride(1) == d
    if together and h * d <= LONGEST_ROW:
        rows = x.transpose(1, 2).flatten(2)[:, None]  # [B, 1, N, H * D], a view
        return _gathered(rows, order).view(b, -1, h, d).transpose(1, 2)
    return _gathered(x, order)


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    b, h, _, d = x.shape
    p, width = order.shape[-1], triton.next_power_of_2(d)
    y = torch.empty(b, h, p, d, dtype=x.dtype, device=x.device)
    lead = (
        (0, 0)
        if order.ndim == 1
        else tuple(0 if n == 1 else s for n, s in zip(order.shape[:2], order.stride()[:2], strict=True))
    )
    rows = max(1, 8192 // width // max(1, x.element_size() // 2))
    gather_rows[(triton.cdiv(p, rows), b * h)](
        x, order, y, *x.stride(), *lead, h, p, D=d, DP=width, ROWS=rows, num_warps=4
    )
    return y
