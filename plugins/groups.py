"""Grouped attention on one grid: which groups see which, how many pairs that is, and which setting a budget buys.

Letters: L axis length, N grid tokens, p query group, m key group, b reach in groups.

* "B": groups within b of the query's group on every axis. "X": groups that share a coordinate on some axis (2-D a row and a column of
  groups, 3-D three planes). "X-lines": groups that differ on at most one axis.
* Axes of length 1 are not axes: on them every token shares its coordinate, which would make "X" dense.

Source: "Grouping First, Attending Smartly" (Ren et al., 2025).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from foveal.plugins.order import by
from foveal.plugins.windows import AxisTable, group_table

PATTERNS = ("B", "X", "X-lines", "dense")
BOUNDARIES = ("clip", "shift")


@dataclass(frozen=True)
class Groups:
    """A concrete setting, one entry per axis of the grid; hashable.

    b: reach in groups, -1 the whole axis. shift: groups start that many tokens before the grid, so the first one is shorter.
    """

    grid: tuple[int, ...]
    group: tuple[int, ...]
    pattern: str = "B"
    b: tuple[int, ...] = ()
    boundary: str = "clip"
    shift: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Groups per axis."""
        return tuple(-(-(length + s) // g) for length, g, s in zip(self.grid, self.group, self.shift, strict=True))

    @property
    def tables(self) -> tuple[AxisTable, ...]:
        """Per-axis windows of "B" (of "dense": the whole axes)."""
        reach = self.b if self.pattern == "B" else (-1,) * len(self.grid)
        knobs = zip(self.grid, self.group, reach, self.shift, strict=True)
        return tuple(group_table(n, g, b, self.boundary == "shift", s) for n, g, b, s in knobs)

    def of_tokens(self) -> np.ndarray:
        """Group coordinates of all tokens, row-major. -> int64 [N, A]"""
        where = np.indices(self.grid).reshape(len(self.grid), -1).T
        return (where + np.array(self.shift)) // np.array(self.group)

    def sees(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Do groups ``mine`` [R, A] attend groups ``theirs`` [C, A]? "X" and "X-lines". -> bool [R, C]"""
        differ = sum(
            (mine[:, a, None] != theirs[None, :, a]).astype(np.int8) for a, length in enumerate(self.grid) if length > 1
        )
        axes = sum(length > 1 for length in self.grid)
        if axes == 0:
            return np.ones((len(mine), len(theirs)), bool)
        return differ < axes if self.pattern == "X" else differ <= 1

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs of grid tokens, exactly."""
        if self.pattern in ("B", "dense"):
            return math.prod(t.pairs for t in self.tables)
        inside, all_ = self._axis_pairs()
        if not inside:
            return 1
        if self.pattern == "X":
            return math.prod(all_) - math.prod(a - i for a, i in zip(all_, inside, strict=True))
        lines = (math.prod(inside[:a]) * (all_[a] - inside[a]) * math.prod(inside[a + 1 :]) for a in range(len(inside)))
        return math.prod(inside) + sum(lines)

    def _axis_pairs(self) -> tuple[list[int], list[int]]:
        """Pairs of coordinates in the same group, and all pairs, for axes longer than 1."""
        inside, all_ = [], []
        for length, g, s in zip(self.grid, self.group, self.shift, strict=True):
            if length > 1:
                inside.append(int((np.bincount((np.arange(length) + s) // g) ** 2).sum()))
                all_.append(length**2)
        return inside, all_

    def __str__(self) -> str:
        reach = "" if self.pattern != "B" else f" b={by(self.b)}" + ("" if self.boundary == "clip" else " shift")
        shifted = f" offset {by(self.shift)}" if any(self.shift) else ""
        return f"grat-{self.pattern}{reach} group {by(self.group)}{shifted}"


def settings(base: Groups, patterns: tuple[str, ...]) -> Iterator[Groups]:
    """Settings a budget may choose from: b of nearly equal reach on the two last axes, any reach on the first; "X"; "X-lines"."""
    if "B" in patterns:
        reaches = [
            range(0, max(1, n)) if length > 1 else range(0, 1) for n, length in zip(base.counts, base.grid, strict=True)
        ]
        for b in itertools.product(*reaches):
            whole = [r == n - 1 for r, n in zip(b, base.counts, strict=True)]
            plane = [r for r, w, length in zip(b[-2:], whole[-2:], base.grid[-2:], strict=True) if length > 1 and not w]
            if not plane or max(plane) - min(plane) <= 1:
                yield replace(base, pattern="B", b=b)
    for pattern in ("X", "X-lines"):
        if pattern in patterns:
            yield replace(base, pattern=pattern)


def density_of(pairs: int, grid: tuple[int, ...], n_global: int) -> float:
    """Attended / all pairs with ``n_global`` tokens that see and are seen by everything."""
    n = math.prod(grid)
    return (pairs + 2 * n * n_global + n_global**2) / (n + n_global) ** 2
