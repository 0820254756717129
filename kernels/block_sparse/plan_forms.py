"""Forms of a plan that kernels read: flags of dense rows, the launch order, listed bits, packed boxes. Worked out once per plan.

Letters as in plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from foveal.kernels.block_sparse import counting
from foveal.kernels.block_sparse.plan import BlockPlan, Box

Form = TypeVar("Form")


def derived(plan: BlockPlan, name: str, make: Callable[[BlockPlan], Form]) -> Form:
    """``make(plan)``, kept with the plan."""
    if name not in plan.derived:
        plan.derived[name] = make(plan)
    return plan.derived[name]


def stride_of(x: Tensor, dim: int) -> int:
    """Stride along ``dim``, 0 where shared."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def lead(x: Tensor | None) -> tuple[int, int]:
    """Strides over batch and heads, 0 where shared."""
    return (0, 0) if x is None else (stride_of(x, 0), stride_of(x, 1))


def dense_flags(plan: BlockPlan) -> Tensor:
    """1 where a query block visits everything. -> int32 [R]"""
    return counting.dense_row_mask(plan).to(torch.int32)


def every_block(plan: BlockPlan) -> Tensor:
    """The list of dense rows. -> int32 [C]"""
    return torch.arange(plan.n_kv_blocks, dtype=torch.int32, device=plan.device)


def launch_order(plan: BlockPlan) -> Tensor:
    """Query blocks, longest list first. -> int32 [R]"""
    cost = plan.count.amax((0, 1)) + counting.dense_row_mask(plan) * plan.n_kv_blocks
    return torch.argsort(cost, dim=0, descending=True, stable=True).to(torch.int32)


def listed_words(plan: BlockPlan) -> Tensor:
    """Bit c of word c // 32 is set where block c is listed. -> int32 [Bm, Hm, R, ceil(C / 32)]"""
    bits = counting.visits(plan)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    weights = (1 << torch.arange(32, device=bits.device)).to(torch.int64)
    return (bits * weights).sum(-1).to(torch.int32)


def as_order(plan: BlockPlan, order: Tensor) -> Tensor:
    """-> int32 [1 or B, 1 or H, P], contiguous"""

    def make(_: BlockPlan) -> Tensor:
        return order.to(torch.int32).reshape(*([1] * (3 - order.ndim)), *order.shape).contiguous()

    return derived(plan, "q_order", make)


class PackedBox(NamedTuple):
    """A box mask in one 32-bit word per token: low, high int32 [Pq], coord int32 [Pk], and the guard bits of all axes.

    Axis a takes ``bits_a + 1`` bits: its value and, above it, a guard. ``coord - low`` and ``high - coord`` (low and high hold the guard's
    share) keep the guard of an axis exactly where ``low <= coord`` and ``coord < high``; no field borrows from the next.
    """

    low: Tensor
    high: Tensor
    coord: Tensor
    guard: int


def fields(box: Box) -> list[tuple[int, int]] | None:
    """(shift, bits) of every axis, or None when 32 bits do not hold them."""
    found, shift = [], 0
    for low, high in box.span or ():
        if low < 0:
            return None
        bits = max(1, high.bit_length())
        found.append((shift, bits))
        shift += bits + 1
    return found if shift <= 32 else None


def packed_box(plan: BlockPlan) -> PackedBox | None:
    """The plan's box in words, or None when its coordinates need more than 32 bits."""
    box = plan.box
    if box is None or (layout := fields(box)) is None:
        return None
    low, high, coord = (x.to(torch.int64) for x in (box.low, box.high, box.coord))
    empty = (high <= low).any(0)
    words: list[Tensor] = [torch.zeros_like(low[0]), torch.zeros_like(low[0]), torch.zeros_like(coord[0])]
    guard = 0
    for axis, (shift, bits) in enumerate(layout):
        full = 1 << bits
        low_a = low[axis].clamp(0, full)
        high_a = (high[axis] - 1).clamp(0, full - 1)
        closed = empty | (low[axis] >= full) | (high[axis] <= 0)  # nothing lies inside
        low_a, high_a = torch.where(closed, full, low_a), torch.where(closed, 0, high_a)
        # low - 2^bits and high + 2^bits: the differences stay in 1 .. 2^(bits + 1) - 1
        words[0] += (low_a - full) << shift
        words[1] += (high_a + full) << shift
        words[2] += coord[axis] << shift
        guard |= full << shift
    return PackedBox(_word(words[0]), _word(words[1]), _word(words[2]), int(_word(torch.tensor(guard))))


def _word(x: Tensor) -> Tensor:
    """The low 32 bits, as a signed integer."""
    return ((x + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
