"""Tile shapes: a good default for a grid, and the one that makes a neighbourhood visit fewest tokens.

Letters: L axis length, V tokens of a tile.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

from foveal.plugins.order import axis_tiles
from foveal.plugins.windows import Window

# Grids whose group the literature or exact divisibility settles.
KNOWN = {
    (32, 48, 80): (4, 8, 8),
    (30, 48, 80): (2, 8, 8),
    (33, 45, 80): (3, 5, 8),
    (21, 45, 80): (3, 5, 8),
    (21, 30, 52): (3, 5, 4),
}
SMALL = 2048  # tokens of a grid that does not fill a GPU's tiles
LONGEST = 32  # tokens of a tile along one axis


@lru_cache(maxsize=256)
def default_group(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The group (and tile) a grid gets when none is given.

    Images: 8x8 below 128 tokens a side, 16x16 from there. Video: about 128 tokens, near cubes that divide the grid, and room for
    at least three groups on every axis that allows it. 1-D: 128 tokens.
    """
    long = [g for g in grid if g > 1]
    if grid in KNOWN:
        return KNOWN[grid]
    if len(long) <= 1:
        return tuple(1 if g == 1 else min(128, max(1, g // 4)) for g in grid)
    target = (16 if max(long) >= 128 else 8) ** 2 if len(long) == 2 else 128
    sizes = [range(1, 2) if g == 1 else range(1, min(LONGEST, max(1, g // 3)) + 1) for g in grid]
    return min(itertools.product(*sizes), key=lambda t: _untidiness(t, grid, target))


def _untidiness(tile: tuple[int, ...], grid: tuple[int, ...], target: int) -> tuple[float, tuple[int, ...]]:
    """Distance from the target volume, padding of the last tiles, and surface per token; smaller is better."""
    volume = math.prod(tile)
    padding = float(np.prod([-(-g // t) * t / g for t, g in zip(tile, grid, strict=True)]))
    long = [t for t, g in zip(tile, grid, strict=True) if g > 1]
    surface = sum(1 / t for t in long) / (len(long) * volume ** (-1 / len(long)))
    size = volume / target
    return (max(size, 1 / size) ** 0.5 * padding**2 * surface * (1.25 if size > 1 else 1.0), tile)


@lru_cache(maxsize=256)
def auto_tile(window: Window, block: int) -> tuple[int, ...]:
    """The tile of block / 2 to 2 * block tokens for which queries visit fewest tokens; among near equals the most compact.

    Visits multiply over axes, so each axis is measured once. A block costs as much as 4 more keys would, a visit with a pair mask a
    quarter more than one without, and kernels take the queries of a tile by 128 and its keys by 64 (small grids, which fill no GPU, aside).
    """
    shares = [_shares(window, axis) for axis in range(len(window.grid))]
    sizes = np.stack(np.meshgrid(*[np.arange(1, len(s) + 1) for s in shares], indexing="ij"), -1).reshape(
        -1, len(shares)
    )
    volume = sizes.prod(1)
    most = math.prod(len(s) for s in shares)
    fits = (volume >= min(block // 2, most)) & (volume <= 2 * block)
    sizes, volume = sizes[fits], volume[fits]
    visited, full, tiles = (np.prod([s[sizes[:, a] - 1, i] for a, s in enumerate(shares)], axis=0) for i in range(3))
    tokens = math.prod(window.grid)
    taken = (
        tiles**2 * (-(-volume // 128) * 128.0) * (-(-volume // 64) * 64.0) / tokens**2
        if tokens >= SMALL
        else 1 + 12 / volume
    )
    cost = (visited + 0.25 * (visited - full)) * (1 + 4 / volume) * taken
    near = cost <= 1.03 * cost.min()
    sizes = sizes[near]
    return tuple(int(t) for t in sizes[np.argmin((1 / sizes).sum(1))])


def _shares(window: Window, axis: int) -> np.ndarray:
    """Visited and fully visited pairs / all pairs on one axis, and tiles, for tile lengths 1, 2, ... up to the longest. -> [lengths, 3]

    The windows of a tile's queries make one range of positions, so its ends say which key tiles are visited.
    """
    length, dilation, table = window.grid[axis], window.dilation[axis], window.tables[axis]
    longest = LONGEST if sum(g > 1 for g in window.grid) > 1 else LONGEST**2
    shares = []
    for tile in range(1, min(-(-length // dilation), longest) + 1):
        tiles = axis_tiles(length, tile, dilation)
        by_tile = np.argsort(tiles.tile_of, kind="stable")
        first = np.searchsorted(tiles.tile_of[by_tile], np.arange(tiles.count))
        low, high = table.low[by_tile], table.high[by_tile]
        in_class = -(-(length - tiles.residue) // dilation)
        visited = (
            np.minimum(-(-np.maximum.reduceat(high, first) // tile) * tile, in_class)
            - np.minimum.reduceat(low, first) // tile * tile
        )
        last = np.minimum.reduceat(high, first)
        inner = (
            np.where(last >= in_class, in_class, last // tile * tile)
            - -(-np.maximum.reduceat(low, first) // tile) * tile
        )
        queries = tiles.stop - tiles.start
        some, every = float(queries @ visited), float(queries @ np.maximum(inner, 0))
        shares.append((some / length**2, every / length**2, float(tiles.count)))
    return np.array(shares)
