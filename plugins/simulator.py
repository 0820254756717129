"""How much of a neighbourhood's theoretical gain a tiled kernel keeps, worked out on paper: visited tiles, counted.

Letters: L axis length, w window, n tiles of an axis.

* ``worst`` is the published figure (all key tiles / the most any query tile visits); ``mean`` predicts a saturated GPU better.
* Static key tiles lie on a fixed raster, as in our kernel; dynamic ones start at the corner of each query tile's own window.

Source: "Generalized Neighborhood Attention" (Hassani et al., 2025), whose simulator was described but not released.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveal.plugins.axes import checked_flags, checked_ints, per_axis
from foveal.plugins.block_map import axis_visits
from foveal.plugins.order import axis_tiles, by
from foveal.plugins.site import MethodError
from foveal.plugins.windows import Window

Mode = Literal["static", "dynamic"]
Ints = int | tuple[int, ...]


@dataclass(frozen=True)
class SimResult:
    """flop_speedup all pairs / attended pairs; worst, mean all key tiles / visited key tiles; partial_share of visits with a pair mask.

    density is attended / all pairs in tokens; visited the same for whole visited tiles.
    """

    window: Window
    flop_speedup: float
    worst: float
    mean: float
    partial_share: float
    density: float
    visited: float

    @property
    def fully_block_sparse(self) -> bool:
        return self.partial_share == 0

    def end_to_end(self, share: float, sparse_steps: float = 1.0, mean: bool = False) -> float:
        """Whole-model speed-up when attention is ``share`` of a dense run's time and that part of the steps is sparse."""
        p = share * sparse_steps
        return 1 / (1 - p + p / (self.mean if mean else self.worst))


@dataclass(frozen=True, eq=False)
class _Axis:
    """Per query tile: visited and full key tiles, visited key tokens; queries [n]. total key tiles of the axis."""

    visited: np.ndarray
    full: np.ndarray
    tokens: np.ndarray
    queries: np.ndarray
    total: int


def simulate(
    grid: Sequence[int],
    window: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    causal: bool | tuple[bool, ...] = False,
    *,
    q_tile: Ints,
    kv_tile: Ints | None = None,
    mode: Mode = "static",
) -> SimResult:
    """Visits of a neighbourhood with query tiles and key tiles of given shapes (``kv_tile`` default: ``q_tile``).

    Raises ``MethodError`` for knobs that do not fit the grid. Dynamic tiling knows no dilation.
    """
    grid = tuple(grid)
    setting = _window(grid, window, stride, dilation, causal)
    q_tile = per_axis("q_tile", checked_ints("q_tile", q_tile, 1), grid, 1)
    kv_tile = q_tile if kv_tile is None else per_axis("kv_tile", checked_ints("kv_tile", kv_tile, 1), grid, 1)
    if mode not in ("static", "dynamic"):
        raise MethodError(f"mode is {mode!r}; it is 'static' or 'dynamic'.")
    if mode == "dynamic" and max(setting.dilation) > 1:
        raise MethodError(
            f"dynamic key tiles know no dilation; dilation is {by(setting.dilation)}, so use static ones."
        )
    axes = [_axis(setting, a, q_tile[a], kv_tile[a], mode) for a in range(len(grid))]
    total = math.prod(a.total for a in axes)
    everything = math.prod(grid) ** 2
    visits = math.prod(int(a.visited.sum()) for a in axes)
    return SimResult(
        setting,
        flop_speedup=everything / setting.pairs,
        worst=total / math.prod(int(a.visited.max()) for a in axes),
        mean=total / math.prod(float(a.visited.mean()) for a in axes),
        partial_share=1 - math.prod(int(a.full.sum()) for a in axes) / visits,
        density=setting.pairs / everything,
        visited=math.prod(int(a.queries @ a.tokens) for a in axes) / everything,
    )


def _window(
    grid: tuple[int, ...], window: Ints, stride: Ints, dilation: Ints, causal: bool | tuple[bool, ...]
) -> Window:
    wide = per_axis("window", checked_ints("window", window, 1, -1), grid, 1)
    return Window(
        grid,
        tuple(length if w == -1 else w for w, length in zip(wide, grid, strict=True)),
        per_axis("stride", checked_ints("stride", stride, 1), grid, 1),
        per_axis("dilation", checked_ints("dilation", dilation, 1), grid, 1),
        per_axis("causal", checked_flags("causal", causal), grid, False),
    ).check()


def _axis(window: Window, axis: int, q_tile: int, kv_tile: int, mode: Mode) -> _Axis:
    length, dilation, table = window.grid[axis], window.dilation[axis], window.tables[axis]
    q, kv = axis_tiles(length, q_tile, dilation), axis_tiles(length, kv_tile, dilation)
    queries = q.stop - q.start
    if mode == "static":
        some, every = axis_visits(table, q, kv)
        return _Axis(some.sum(1), every.sum(1), some @ (kv.stop - kv.start), queries, kv.count)
    low = np.minimum.reduceat(table.low, q.start)
    high = np.maximum.reduceat(table.high, q.start)
    inner = (np.maximum.reduceat(table.low, q.start), np.minimum.reduceat(table.high, q.start))
    visited = -(-(high - low) // kv_tile)
    start = low[:, None] + np.arange(visited.max()) * kv_tile
    stop = np.minimum(start + kv_tile, length)
    used = start < high[:, None]
    full = used & (start >= inner[0][:, None]) & (stop <= inner[1][:, None])
    return _Axis(visited, full.sum(1), np.where(used, stop - start, 0).sum(1), queries, kv.count)


def search_stride(
    grid: Sequence[int],
    window: Ints,
    dilation: Ints = 1,
    causal: bool | tuple[bool, ...] = False,
    *,
    q_tile: Ints,
    kv_tile: Ints | None = None,
    mode: Mode = "static",
) -> list[SimResult]:
    """Strides worth having, from 1 upwards, by rising ``worst`` speed-up: each visits less than every smaller stride.

    Larger strides cost quality, so a stride stays only if no stride that is smaller or equal on every axis does as well.
    """
    grid = tuple(grid)
    base = _window(grid, window, 1, dilation, causal)
    q_tile = per_axis("q_tile", checked_ints("q_tile", q_tile, 1), grid, 1)
    kv_tile = q_tile if kv_tile is None else per_axis("kv_tile", checked_ints("kv_tile", kv_tile, 1), grid, 1)
    useful = [_useful_strides(base, a, q_tile[a], kv_tile[a], mode) for a in range(len(grid))]
    found = [
        simulate(grid, base.window, s, base.dilation, base.causal, q_tile=q_tile, kv_tile=kv_tile, mode=mode)
        for s in itertools.product(*useful)
    ]
    return sorted(found, key=lambda r: (r.worst, r.mean, [-s for s in r.window.stride]))


def _useful_strides(base: Window, axis: int, q_tile: int, kv_tile: int, mode: Mode) -> list[int]:
    """Visits multiply over axes, so each axis is searched alone."""
    best, kept = (math.inf, math.inf), []
    for s in range(1, base.window[axis] + 1):
        stride = tuple(s if a == axis else 1 for a in range(len(base.grid)))
        measured = _axis(
            Window(base.grid, base.window, stride, base.dilation, base.causal), axis, q_tile, kv_tile, mode
        )
        cost = (float(measured.visited.max()), float(measured.visited.mean()))
        if cost < best:
            best = cost
            kept.append(s)
    return kept
