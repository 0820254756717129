"""Neighbourhood rules, one axis at a time: the only place where they are coded.

Letters: L axis length, w window, s stride, d dilation.

* A query at position i of its residue class (n long) looks at class positions low..high-1. The leader of its stride group places
  the window: min((i // s) * s + s // 2, n - 1); near a border the window is pushed inwards, never cut.
* Causal: the leader is the last query of the group, the window ends at the leader, and a query sees positions up to its own.
* Groups of blocks (GRAT) are the same thing with other tables, so they share everything downstream.

Sources: "Generalized Neighborhood Attention" (Hassani et al., 2025); "Grouping First, Attending Smartly" (Ren et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foveal.plugins.order import by
from foveal.plugins.site import MethodError


@dataclass(frozen=True, eq=False)
class AxisTable:
    """One axis: residue class, class position, and the window [low, high) of every coordinate. int64 [L], host."""

    residue: np.ndarray
    position: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def pairs(self) -> int:
        return int((self.high - self.low).sum())


def neighborhood_table(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> AxisTable:
    """Generalised neighbourhood attention on one axis of ``length`` tokens."""
    x = np.arange(length)
    residue, i = x % dilation, x // dilation
    n = -(-(length - residue) // dilation)
    if causal:
        lead = np.minimum(i // stride * stride + stride - 1, n - 1)
        return AxisTable(residue, i, np.maximum(lead - window + 1, 0), i + 1)
    lead = np.minimum(i // stride * stride + stride // 2, n - 1)
    low = np.clip(lead - window // 2, 0, n - window)
    return AxisTable(residue, i, low, low + window)


def group_table(length: int, group: int, reach: int, inwards: bool, shift: int = 0) -> AxisTable:
    """Groups within ``reach`` of the query's group (-1: all), in tokens. ``inwards``: near a border the range moves, keeping its length."""
    x = np.arange(length)
    mine, n = (x + shift) // group, -(-(length + shift) // group)
    reach = n - 1 if reach < 0 else reach
    first, last = mine - reach, mine + reach + 1
    if inwards:
        width = min(2 * reach + 1, n)
        first = np.clip(first, 0, n - width)
        last = first + width
    low, high = np.clip(first * group - shift, 0, length), np.clip(last * group - shift, 0, length)
    return AxisTable(np.zeros_like(x), x, low, high)


@dataclass(frozen=True)
class Window:
    """Checked neighbourhood parameters on one grid, one entry per axis."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def tables(self) -> tuple[AxisTable, ...]:
        return tuple(neighborhood_table(*axis) for axis in self._by_axis())

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs, exactly."""
        return int(np.prod([t.pairs for t in self.tables], dtype=object))

    @property
    def is_dense(self) -> bool:
        return self.pairs == int(np.prod(self.grid)) ** 2

    def _by_axis(self) -> list[tuple[int, int, int, int, bool]]:
        return list(zip(self.grid, self.window, self.stride, self.dilation, self.causal, strict=True))

    def check(self) -> Window:
        """Returns itself. Raises ``MethodError`` that names the axis and the largest legal value."""
        for axis, (length, w, s, d, _) in enumerate(self._by_axis()):
            if w * d > length:
                raise MethodError(
                    f"window {w} with dilation {d} reaches {w * d} tokens on axis {axis} of the grid {by(self.grid)}; "
                    f"that axis has {length}, so the window is at most {length // d}."
                )
            if s > w:
                raise MethodError(
                    f"stride {s} exceeds the window {w} on axis {axis}; stride groups would skip tokens, so give at most {w}."
                )
        return self

    def __str__(self) -> str:
        text = f"window {by(self.window)}"
        for name, value in (("stride", self.stride), ("dilation", self.dilation)):
            text += f" {name} {by(value)}" if max(value) > 1 else ""
        return text + (f" causal {by([int(c) for c in self.causal])}" if any(self.causal) else "")


def adapt(window: Window, base: Sequence[int]) -> Window:
    """Scale window, stride and dilation from a base grid to this one (-1 in base: the present length). Halves round to even.

    The rule of the published Cosmos configurations; it may break tile alignment, see ``snap``.
    """
    axes = []
    for (length, w, s, d, c), b in zip(window._by_axis(), base, strict=True):
        factor = 1.0 if b == -1 else length / b
        w2 = min(max(2, round(w * factor)), length)
        s2 = min(max(1, round(s * factor)), w2)
        axes.append((w2, s2, min(max(1, round(d * factor)), length // w2), c))
    ws, ss, ds, cs = zip(*axes, strict=True)
    return Window(window.grid, ws, ss, ds, cs)


def snap(window: Window, tile: Sequence[int], how: str) -> Window:
    """Move the window to an odd number of tiles and the stride to one tile, so that tiles are visited whole where they divide the grid.

    how: "cover" takes the smallest that holds the window, "nearest" the nearest (the larger of two equally near).
    A window that would leave the grid becomes the whole axis.
    """
    axes = []
    for (length, w, _, d, c), t in zip(window._by_axis(), tile, strict=True):
        room = length // d
        odd = max(0, -(-(w - t) // (2 * t))) if how == "cover" else int(np.floor((w - t) / (2 * t) + 0.5))
        wide = (2 * max(0, odd) + 1) * t
        whole = wide > room or (how == "nearest" and abs(room - w) < abs(wide - w))
        axes.append((room if whole else wide, min(t, room), d, c))
    ws, ss, ds, cs = zip(*axes, strict=True)
    return Window(window.grid, ws, ss, ds, cs)
