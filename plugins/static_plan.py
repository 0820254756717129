"""From tile visits on the grid to a plan over the whole sequence, text and other global tokens included.

Letters: N sequence tokens, R query blocks, C key blocks.

* Plan positions keep every span where it lies and permute only inside the visual span. So the same plan serves a host that has
  permuted its visual tokens already (``ordered``) and one that has not.
* Every visual query block lists all global key blocks; global query blocks are dense rows.
* Blocks are numbered by address, so sorted lists stream through memory.
* A text length per sample only shortens ``kv_len``: no list is rebuilt and nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan, Box
from foveal.plugins.block_map import Rows
from foveal.plugins.layout import Layout
from foveal.plugins.order import Order
from foveal.plugins.site import MethodError

GLOBAL_BLOCK, SHORTEST_GLOBAL_BLOCK = 256, 64  # bounds on the tokens in a block of text and other global tokens
CHUNK = 1 << 24  # entries of the block map held at once
NEVER_CUT = -(1 << 30)


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """A plan made from coordinates alone, and how a text length per sample shortens it.

    text_before: int32 [C], text tokens before each key block of the text span; very negative for every other block.
    """

    plan: BlockPlan
    text_before: Tensor | None = None

    def to(self, device: torch.device | str) -> StaticPlan:
        before = None if self.text_before is None else self.text_before.to(device)
        return StaticPlan(self.plan.to(device), before)

    def with_valid_text(self, valid: Tensor | None) -> BlockPlan:
        """valid: int [B] on the plan's device, how many lead text tokens are real; None: all."""
        if valid is None or self.text_before is None:
            return self.plan
        room = (valid.to(torch.int32)[:, None] - self.text_before).clamp_(min=0)
        return self.plan.with_kv_len(torch.minimum(room, self.plan.kv_len[0]), same_cells=True)


@dataclass(frozen=True)
class _Runs:
    """Blocks of one side in address order: start, length [n]; which of them are visual; text_before [n]."""

    start: np.ndarray
    length: np.ndarray
    visual: np.ndarray
    text_before: np.ndarray


def static_plan(
    layout: Layout,
    order: Order,
    rows: Rows,
    *,
    key_order: Order | None = None,
    box: Box | None = None,
    row_bits: Tensor | None = None,
    visual_pairs: int | None = None,
    label: str = "",
) -> StaticPlan:
    """Build the plan on the CPU.

    order       token order of the grid; its tiles are the query blocks, and the key blocks unless ``key_order`` says otherwise
    rows        query tiles (a slice) -> bool arrays (visited, full) over key tiles
    box         pair mask of partial entries over grid tokens in plan order
    row_bits    bool [grid tokens in plan order, key tiles], the other pair mask: which key tiles a query sees
    visual_pairs   attended grid pairs, where the rule knows it
    Raises ``MethodError`` where order and layout are of different grids, or the spans do not tile the sequence.
    """
    layout.check()
    keys = key_order or order
    if order.grid != layout.grid or keys.grid != layout.grid:
        raise MethodError(f"the order is of the grid {order.grid}, the layout of {layout.grid}; a plan needs one grid.")
    q_side, kv_side = _runs(layout, order, layout.tokens), _runs(layout, keys, layout.keys)
    visual_rows = np.flatnonzero(q_side.visual)
    count, n_full, index = _lists(len(q_side.start), visual_rows, kv_side.visual, rows)
    n, g = layout.visual.size, layout.global_tokens
    pairs = (
        None if visual_pairs is None else visual_pairs + n * (2 * g + layout.extra_keys) + g * (g + layout.extra_keys)
    )
    plan = BlockPlan(
        n_queries=layout.tokens,
        n_keys=layout.keys,
        q_start=torch.from_numpy(q_side.start),
        q_len=torch.from_numpy(q_side.length),
        kv_start=torch.from_numpy(kv_side.start),
        kv_len=torch.from_numpy(kv_side.length),
        count=count,
        n_full=n_full,
        index=index,
        dense_rows=_dense_rows(q_side.visual),
        box=None if box is None else _spread_box(box, layout),
        row_bits=None if row_bits is None else _pack_bits(row_bits, layout, kv_side.visual),
        pairs=pairs,
        label=label,
        **_orders(layout, order, keys),
    )
    if not bool((n_full < count).any()):
        plan = dataclasses.replace(plan, box=None, row_bits=None)
    plan.require_keys()
    before = torch.from_numpy(kv_side.text_before) if layout.text is not None and layout.text.size else None
    return StaticPlan(plan, before)


def _runs(layout: Layout, order: Order, stop: int) -> _Runs:
    """Blocks in address order. Global spans are cut no longer than the visual blocks: kernels walk every block as the longest."""
    step = min(GLOBAL_BLOCK, max(SHORTEST_GLOBAL_BLOCK, int(order.length.max())))
    parts: list[tuple[int, int, bool, int]] = []
    for span in layout.spans:
        for at in range(span.start, span.stop, step):
            before = at - span.start if span == layout.text else NEVER_CUT
            parts.append((at, min(step, span.stop - at), False, before))
    for at in range(layout.tokens, stop, step):  # extra keys, beyond the sequence
        parts.append((at, min(step, stop - at), False, NEVER_CUT))
    starts, lengths = layout.visual.start + order.start.numpy(), order.length.numpy()
    parts += [(int(s), int(n), True, NEVER_CUT) for s, n in zip(starts, lengths, strict=True)]
    columns = zip(*sorted(parts), strict=True)
    start, length, visual, before_ = (np.array(c) for c in columns)
    return _Runs(start.astype(np.int32), length.astype(np.int32), visual, before_.astype(np.int32))


def _lists(n_rows: int, visual_rows: np.ndarray, visual_keys: np.ndarray, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Tile visits -> count, n_full [R], index [R, K]; full entries first, each part ascending, global blocks full."""
    parts = list(_list_chunks(len(visual_rows), visual_keys, rows))
    width = max(index.shape[1] for _, _, index in parts)
    count, n_full = np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
    index = np.zeros((n_rows, width), np.int32)
    at = 0
    for some, every, ids in parts:
        mine = visual_rows[at : at + len(some)]
        count[mine], n_full[mine] = some, every
        index[mine, : ids.shape[1]] = ids
        at += len(some)
    return torch.from_numpy(count), torch.from_numpy(n_full), torch.from_numpy(index)


def _list_chunks(
    n_tiles: int, visual_keys: np.ndarray, rows: Rows
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    step = max(1, CHUNK // len(visual_keys))
    for first in range(0, n_tiles, step):
        some, every = rows(slice(first, min(n_tiles, first + step)))
        rank = np.zeros((len(some), len(visual_keys)), np.uint8)  # 0 full, 1 partial, 2 not visited
        rank[:, visual_keys] = 2 - some.astype(np.uint8) - every
        count, n_full = (rank < 2).sum(1), (rank == 0).sum(1)
        listed = np.argsort(rank, axis=1, kind="stable")[:, : count.max()]
        last = np.take_along_axis(listed, np.maximum(count - 1, 0)[:, None], axis=1)
        yield count, n_full, np.where(np.arange(listed.shape[1]) < count[:, None], listed, last)


def _dense_rows(visual: np.ndarray) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.r_[True, visual, True].astype(np.int8)))
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def _orders(layout: Layout, order: Order, keys: Order) -> dict[str, Any]:
    """Plan orders over the whole sequence. A key order of its own under an ordered host is taken relative to the host's order."""
    if keys is order:
        if order.identity:
            return {"ordered": layout.ordered}
        return {
            "q_order": _over(layout, order.token, layout.tokens),
            "kv_order": _over(layout, order.token, layout.keys),
            "ordered": layout.ordered,
        }
    if layout.ordered:
        return {"kv_order": _over(layout, order.inverse[keys.token], layout.keys)}
    return {"q_order": _over(layout, order.token, layout.tokens), "kv_order": _over(layout, keys.token, layout.keys)}


def _over(layout: Layout, token: Tensor, length: int) -> Tensor:
    full = torch.arange(length)
    full[layout.visual.start : layout.visual.stop] = token + layout.visual.start
    return full


def _spread_box(box: Box, layout: Layout) -> Box:
    """Grid positions -> plan positions; global positions are never asked."""

    def spread(x: Tensor, length: int) -> Tensor:
        out = torch.zeros(x.shape[0], length, dtype=torch.int16)
        out[:, layout.visual.start : layout.visual.stop] = x
        return out

    low, high, coord = spread(box.low, layout.tokens), spread(box.high, layout.tokens), spread(box.coord, layout.keys)
    return Box(low, high, coord, cell=box.cell)


def _pack_bits(seen: Tensor, layout: Layout, visual_keys: np.ndarray) -> Tensor:
    """bool [grid tokens, key tiles] -> int32 [1, 1, Pq, ceil(C / 32)]; bit c of word c // 32."""
    n_blocks = len(visual_keys)
    wide = np.ones((layout.tokens, -(-n_blocks // 32) * 32), np.uint8)
    wide[layout.visual.start : layout.visual.stop, :n_blocks][:, visual_keys] = seen.numpy()
    words = np.packbits(wide, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))[None, None]
