"""Each place's own kernel over its neighbourhood: the value step of neighbourhood attention, with weights given.

Letters: B batch, g heads, H rows, W columns, N = H W, K window size, c channels of a head, T columns of a stretch, L columns it reads.

* The window of K x K is pushed inwards at borders, as in neighbourhood attention, so every place has K * K values.
* One row of windows times one row of values is a product with a band matrix [T, L]: one for each of the K rows of the window and each
  stretch of columns. Nothing of size N * K * K * c is made, and no band is kept: the backward makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor

COLUMNS = 32  # columns of one band matrix: more is more work for the same result, fewer is more calls


def window_starts(length: int, size: int, device: Any = None) -> Tensor:
    """First place of every place's window on an axis, int64 [length]."""
    return (torch.arange(length, device=device) - size // 2).clamp(0, length - size)


class Band(NamedTuple):
    """Row ``row`` of the windows of columns first..last-1, which reads columns low..high-1. slot [B, g, H, T, K]: each weight's column."""

    row: int
    first: int
    last: int
    low: int
    high: int
    slot: Tensor

    def weights(self, w: Tensor) -> Tensor:
        """[B, g, H, W, K * K] -> a view [B, g, H, T, K]"""
        size = self.slot.shape[-1]
        return w[:, :, :, self.first : self.last, self.row * size : (self.row + 1) * size]

    def matrix(self, w: Tensor) -> Tensor:
        """-> [B, g, H, T, L]"""
        zero = w.new_zeros(*self.slot.shape[:-1], self.high - self.low)
        return zero.scatter_(-1, self.slot, self.weights(w))


def bands(w: Tensor) -> Iterator[Band]:
    size, width = window_of(w), w.shape[3]
    starts, inside = window_starts(width, size, w.device), torch.arange(size, device=w.device)
    step = max(COLUMNS, size)
    for first in range(0, width, step):
        last = min(first + step, width)
        low, high = (min(max(x - size // 2, 0), width - size) for x in (first, last - 1))
        slot = (starts[first:last, None] - low + inside).expand(*w.shape[:3], -1, -1)
        for row in range(size):
            yield Band(row, first, last, low, high + size, slot)


def window_of(w: Tensor) -> int:
    """K of kernels [.., K * K]."""
    return round(w.shape[-1] ** 0.5)


@torch.library.custom_op("foveal::neighborhood_mix", mutates_args=())
def _mix(w: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(v.shape, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    rows = window_starts(v.shape[2], window_of(w), v.device)
    with torch.autocast(v.device.type, enabled=False):  # it would change types inside
        for band in bands(w):
            values = v[:, :, :, band.low : band.high].index_select(2, rows + band.row)  # [B, g, H, L, c]
            out[:, :, :, band.first : band.last] += band.matrix(w) @ values
    return out.to(v.dtype)


@_mix.register_fake
def _(w: Tensor, v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("foveal::neighborhood_mix_backward", mutates_args=())
def _mix_backward(grad: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    d_w = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    d_v = torch.zeros(v.shape, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    rows = window_starts(v.shape[2], window_of(w), v.device)
    with torch.autocast(v.device.type, enabled=False):
        for band in bands(w):
            values = v[:, :, :, band.low : band.high].index_select(2, rows + band.row)
            out = grad[:, :, :, band.first : band.last]
            band.weights(d_w).copy_((out @ values.mT).gather(-1, band.slot))
            d_v[:, :, :, band.low : band.high].index_add_(2, rows + band.row, (band.matrix(w).mT @ out).to(d_v.dtype))
    return d_w, d_v.to(v.dtype)


@_mix_backward.register_fake
def _(grad: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    empty = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    return empty(w), empty(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _mix_backward(grad, *ctx.saved_tensors)


_mix.register_autograd(_back, setup_context=_keep)


@register_notrace_function
def neighborhood_mix(w: Tensor, v: Tensor) -> Tensor:
    """Each place's own kernel over its neighbourhood: ``out_i = sum_j w_ij v_j`` over the K x K window of i, pushed inwards at borders.

    w   [B, g, H, W, K * K], a window's places row by row; any values (no softmax is taken)
    v   [B, g, H, W, c] of the same float type

    -> [B, g, H, W, c]. Sums are fp32 for narrower types. Differentiable once, in both. Raises ``ValueError`` for shapes that do not fit
    and for windows larger than the map.
    """
    size = window_of(w)
    if w.ndim != 5 or v.ndim != 5 or w.shape[:4] != v.shape[:4] or size * size != w.shape[-1] or size < 1:
        raise ValueError(
            f"w {tuple(w.shape)} and v {tuple(v.shape)} do not fit; [B, g, H, W, K * K] and [B, g, H, W, c] are needed."
        )
    if size > min(v.shape[2:4]):
        raise ValueError(
            f"the window of {size} by {size} is larger than the map of {v.shape[2]} by {v.shape[3]}; enlarge the map, or take a smaller one."
        )
    if w.dtype != v.dtype or w.device != v.device:
        raise ValueError(
            f"w is {w.dtype} on {w.device} and v is {v.dtype} on {v.device}; give both one type and device."
        )
    return _mix(w, v)
