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
OUTSIDE = 1 << 14  # above every coordinate


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
    """Query blocks of every head, longest list first. -> int32 [Bm, Hm, R]"""
    cost = torch.where(counting.dense_row_mask(plan), plan.n_kv_blocks, plan.count)
    return torch.argsort(cost, dim=-1, descending=True, stable=True).to(torch.int32)


def row_facts(plan: BlockPlan) -> Tensor:
    """All that a kernel asks of a query block, in ``launch_order``. -> int32 [Bm, Hm, R, 8]

    The block, its start and length, its full and all entries, whether it is dense (then these are all blocks), and in two words where
    its list begins in ``index``.
    """
    which = torch.arange(plan.n_q_blocks, dtype=torch.int32, device=plan.device)
    entries, dense = [plan.n_full, plan.count], torch.zeros_like(which)
    if plan.dense_rows:
        mask = counting.dense_row_mask(plan)
        entries, dense = [torch.where(mask, plan.n_kv_blocks, x) for x in entries], mask.int()
    rows = plan.index.shape[:3]
    lists = torch.arange(rows.numel(), device=plan.device).view(rows) * plan.index.shape[-1]
    words = lists.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    table = torch.stack(torch.broadcast_tensors(which, plan.q_start, plan.q_len, *entries, dense, *words), -1)
    if plan.spread == 0:
        return table
    order = launch_order(plan).long()[..., None]
    shape = torch.broadcast_shapes(table.shape[:3], order.shape[:3])
    return table.expand(*shape, 8).gather(2, order.expand(*shape, 8))


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


class Cells(NamedTuple):
    """A box mask as a product: ``hidden @ hot.T``, where ``hot`` [BN, W] marks the place of each key of a block along every axis.

    low, high int32 [A, Pq]; origin int32 [C, W], the first key's coordinate on the axis of each place; dims int32 [2, W], the axis and
    the offset of each place. Of W places those that stand for nothing are never used, but for one that hides what lies behind a block.
    """

    low: Tensor
    high: Tensor
    origin: Tensor
    hot: Tensor
    dims: Tensor


def cells(plan: BlockPlan, keys: int) -> Cells:
    """For tiles of ``keys``; only where ``cell_width`` finds room."""
    box, width = plan.box, cell_width(plan, keys)
    assert box is not None and box.cell is not None and width
    places = [(axis, offset) for axis, cell in enumerate(box.cell) for offset in range(max(cell) + 1)]
    n = len(box.cell[0])
    hot = torch.zeros(keys, width)
    for i, (axis, offset) in enumerate(places):
        hot[:n, i] = torch.tensor([float(x == offset) for x in box.cell[axis]])
    if n < keys:
        hot[n:, len(places)] = 1
    places += [(0, -OUTSIDE)] * (width - len(places))
    axes, offsets = (list(x) for x in zip(*places, strict=True))
    at = plan.kv_start.reshape(-1)[: plan.n_kv_blocks].long().clamp(max=plan.kv_positions - 1)
    origin = box.coord[:, at][axes].mT.to(torch.int32).contiguous()
    low, high = (x.clamp(0, OUTSIDE // 2).to(torch.int32).contiguous() for x in (box.low, box.high))
    dims = torch.tensor([axes, offsets], dtype=torch.int32)
    return Cells(low, high, origin, hot.to(plan.device, torch.bfloat16), dims.to(plan.device))


def cell_width(plan: BlockPlan, keys: int) -> int:
    """Places that a box mask takes as a product in tiles of ``keys``, 16 or 32; 0 where it cannot be one, or another mask is there too."""
    box = plan.box
    alone = plan.row_bits is None and plan.block_bias is None and plan.key_bias is None
    if box is None or box.cell is None or not alone or plan.max_kv_len > keys or plan.kv_start.shape[:2] != (1, 1):
        return 0
    n = len(box.cell[0])
    if (
        n > keys
        or any(min(cell) < 0 for cell in box.cell)
        or any(low < 0 or high >= OUTSIDE // 2 for low, high in box.span or ())
    ):
        return 0
    places = sum(max(cell) + 1 for cell in box.cell) + (n < keys)
    return 0 if places > 32 else 32 if places > 16 else 16
