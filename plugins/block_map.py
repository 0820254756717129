"""Which tiles see which, built axis by axis; token pairs are never enumerated.

Letters: n tiles of an axis, R query tiles, C key tiles, A axes.

A box-shaped rule splits over the axes: a tile pair is visited iff it is visited on every axis, and full iff full on every axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from foveal.kernels.block_sparse import Box
from foveal.plugins.order import AxisTiles, Order
from foveal.plugins.windows import AxisTable

Rows = Callable[[slice], tuple[np.ndarray, np.ndarray]]  # query tiles -> (visited, full), bool [rows, C] each


def axis_visits(table: AxisTable, q_tiles: AxisTiles, kv_tiles: AxisTiles) -> tuple[np.ndarray, np.ndarray]:
    """-> (visited, full) bool [nq, nk]: some query of the tile sees some key of the other; every query sees every key."""
    same = table.residue[:, None] == kv_tiles.residue
    some = same & (table.low[:, None] < kv_tiles.stop) & (table.high[:, None] > kv_tiles.start)
    every = same & (table.low[:, None] <= kv_tiles.start) & (table.high[:, None] >= kv_tiles.stop)
    by_tile = np.argsort(q_tiles.tile_of, kind="stable")
    first = np.searchsorted(q_tiles.tile_of[by_tile], np.arange(q_tiles.count))
    return np.logical_or.reduceat(some[by_tile], first, axis=0), np.logical_and.reduceat(every[by_tile], first, axis=0)


def box_rows(order: Order, tables: Sequence[AxisTable]) -> Rows:
    """Tile visits of a rule that is a box per query, in the order's tiles."""
    parts = [axis_visits(t, a, a) for t, a in zip(tables, order.axes, strict=True)]
    ids = order.tile_axes

    def rows(chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        visited = full = None
        for axis, (some, every) in enumerate(parts):
            mine, keys = ids[chosen, axis][:, None], ids[:, axis][None]
            visited = some[mine, keys] if visited is None else visited & some[mine, keys]
            full = every[mine, keys] if full is None else full & every[mine, keys]
        assert visited is not None and full is not None
        return visited, full

    return rows


def box_of(order: Order, tables: Sequence[AxisTable]) -> Box | None:
    """Pair mask of the rule over the order's plan positions; axes on which every query sees every key are left out.

    None where no axis is left.
    """
    where = np.indices(order.grid).reshape(len(order.grid), -1)[:, order.token.numpy()]
    low: list[np.ndarray] = []
    high: list[np.ndarray] = []
    coord: list[np.ndarray] = []
    for table, x in zip(tables, where, strict=True):
        in_class = np.bincount(table.residue)[table.residue]
        if ((table.low > 0) | (table.high < in_class)).any():
            shift = int(table.high.max() > np.iinfo(np.int16).max)
            low += [table.low[x] - shift]
            high += [table.high[x] - shift]
            coord += [table.position[x] - shift]
        if table.residue.any():
            low += [table.residue[x]]
            high += [table.residue[x] + 1]
            coord += [table.residue[x]]
    if not coord:
        return None
    packed = [torch.from_numpy(np.stack(part).astype(np.int16)) for part in (low, high, coord)]
    return Box(packed[0], packed[1], packed[2], cell=_cell(packed[2].numpy(), order))


def _cell(coord: np.ndarray, order: Order) -> tuple[tuple[int, ...], ...] | None:
    """Coordinates inside a tile from its first token on, where they are the same in all tiles. coord [A, N]"""
    size = int(order.length[0])
    if not bool((order.length == size).all()):
        return None
    inside = coord.reshape(len(coord), -1, size)
    inside = inside - inside[..., :1]
    if (inside != inside[:, :1]).any():
        return None
    return tuple(tuple(int(x) for x in axis) for axis in inside[:, 0])
