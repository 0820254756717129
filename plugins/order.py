"""Token orders: grid tokens laid out tile by tile, so that a block of consecutive tokens is a box of the grid.

Letters: N grid tokens, A axes, L length of one axis, n tiles.

* Residue classes (dilation) are outermost, row-major; inside a class come the tiles, row-major; inside a tile the offset, row-major.
* Any size works: the last tile of an axis is just shorter. Nothing is padded.
* An order is a pure function of plain numbers, cached, and holds tensors of one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from foveal.plugins.site import MethodError

LONGEST_AXIS = 32768  # coordinates are int16


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """One axis cut into tiles: runs of positions inside one residue class.

    tile_of [L] tile of every coordinate; residue, start, stop [n] class and position range of every tile, class-major.
    Arrays of int64 on the host.
    """

    tile_of: np.ndarray
    residue: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def count(self) -> int:
        return len(self.start)


def axis_tiles(length: int, tile: int, dilation: int = 1, shift: int = 0) -> AxisTiles:
    """Cut an axis into tiles of ``tile`` positions per residue class; ``shift`` makes the first tile that much shorter."""
    x = np.arange(length)
    residue, cell = x % dilation, (x // dilation + shift) // tile
    name = residue * (length + shift + 1) + cell
    _, first, tile_of = np.unique(name, return_index=True, return_inverse=True)
    residue, cell = residue[first], cell[first]
    in_class = -(-(length - residue) // dilation)
    start = np.maximum(cell * tile - shift, 0)
    return AxisTiles(tile_of.reshape(-1), residue, start, np.minimum((cell + 1) * tile - shift, in_class))


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of the grid's tokens and the tiles it lays down as runs.

    grid, tile, dilation, shift   plain numbers per axis
    token     int64 [N]: plan position p holds row-major token ``token[p]``
    inverse   int64 [N]: row-major token i lies at plan position ``inverse[i]``
    start, length  int32 [n]: runs of plan positions, one per tile
    coord     int16 [A, N] in plan order: positions inside the residue class, and one more axis (the class) when dilated
    tiles     number of tiles per axis, all classes together
    axes      how each axis is cut; tile_axes int64 [n, A] (host) names the axis tiles of every tile
    identity  every token stays in its place, as in 1-D without dilation
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]
    shift: tuple[int, ...]
    token: Tensor
    inverse: Tensor
    start: Tensor
    length: Tensor
    coord: Tensor
    axes: tuple[AxisTiles, ...]
    tile_axes: np.ndarray
    identity: bool

    @property
    def tokens(self) -> int:
        return self.token.numel()

    @property
    def tiles(self) -> tuple[int, ...]:
        return tuple(a.count for a in self.axes)

    def permute(self, x: Tensor, dim: int = -2) -> Tensor:
        """Row-major tokens along ``dim`` (default: [.., N, D]) -> plan order."""
        return x.index_select(dim, self.on(x.device).token)

    def restore(self, x: Tensor, dim: int = -2) -> Tensor:
        """Plan order along ``dim`` -> row-major tokens; undoes ``permute`` bit by bit."""
        return x.index_select(dim, self.on(x.device).inverse)

    def on(self, device: torch.device | str) -> Order:
        """The same order on a device, moved there once."""
        device = torch.device(device)
        return self if self.token.device == device else _order(self.grid, self.tile, self.dilation, self.shift, device)

    def __repr__(self) -> str:
        dilated = f", dilation {by(self.dilation)}" if max(self.dilation) > 1 else ""
        return f"Order({by(self.grid)} grid in {len(self.start)} tiles of {by(self.tile)}{dilated})"


def order_of(
    grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None, shift: Sequence[int] | None = None
) -> Order:
    """The order that lays a grid out in tiles. Cached: the same numbers give the same object.

    grid, tile: 1 to 3 numbers, a tile may exceed the grid. dilation: per axis, default 1. shift: per axis, default 0; tiles
    start ``shift`` positions earlier, so the first one is shorter. Raises ``MethodError`` for other ranks and sizes.
    """
    grid, tile = tuple(grid), tuple(tile)
    dilation = (1,) * len(grid) if dilation is None else tuple(dilation)
    shift = (0,) * len(grid) if shift is None else tuple(shift)
    return _order(grid, tile, dilation, shift, torch.device("cpu"))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: what is made for inference first may be trained through later
def _order(
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    dilation: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
) -> Order:
    if device.type != "cpu":
        return _moved(order_of(grid, tile, dilation, shift), device)
    _check(grid, tile, dilation, shift)
    axes = tuple(axis_tiles(*knobs) for knobs in zip(grid, tile, dilation, shift, strict=True))
    where = np.indices(grid).reshape(len(grid), -1)
    residue = np.stack([x % d for x, d in zip(where, dilation, strict=True)])
    position = np.stack([x // d for x, d in zip(where, dilation, strict=True)])
    cell = np.stack([a.tile_of[x] for a, x in zip(axes, where, strict=True)])  # class-major, so it sorts within a class
    shape = [a.count for a in axes]
    name = np.ravel_multi_index(tuple(residue), dilation) * int(np.prod(shape)) + np.ravel_multi_index(
        tuple(cell), shape
    )
    token = np.argsort(name, kind="stable")  # stable: the offset inside a tile stays row-major
    sorted_name = name[token]
    start = np.flatnonzero(np.r_[True, sorted_name[1:] != sorted_name[:-1]])
    inverse = np.empty_like(token)
    inverse[token] = np.arange(token.size)
    coord = position[:, token]
    if max(dilation) > 1:
        coord = np.concatenate([coord, np.ravel_multi_index(tuple(residue), dilation)[token][None]])
    return Order(
        grid, tile, dilation, shift,
        token=torch.from_numpy(token),
        inverse=torch.from_numpy(inverse),
        start=torch.from_numpy(start.astype(np.int32)),
        length=torch.from_numpy(np.diff(np.r_[start, token.size]).astype(np.int32)),
        coord=torch.from_numpy(coord.astype(np.int16)),
        axes=axes,
        tile_axes=cell[:, token[start]].T.copy(),
        identity=bool((token[1:] > token[:-1]).all()),
    )  # fmt: skip


def _moved(order: Order, device: torch.device) -> Order:
    names = ("token", "inverse", "start", "length", "coord")
    return dataclasses.replace(order, **{name: getattr(order, name).to(device) for name in names})


def _check(grid: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...], shift: tuple[int, ...]) -> None:
    if not 1 <= len(grid) <= 3:
        raise MethodError(f"the grid {by(grid)} has {len(grid)} axes; orders know 1 to 3.")
    for name, value, least in (("grid", grid, 1), ("tile", tile, 1), ("dilation", dilation, 1), ("shift", shift, 0)):
        if len(value) != len(grid):
            raise MethodError(f"{name} {value} has {len(value)} entries; the grid {by(grid)} needs {len(grid)}.")
        if any(isinstance(x, bool) or not isinstance(x, int) or x < least for x in value):
            raise MethodError(f"{name} {value} must hold whole numbers of at least {least}.")
    if max(grid) > LONGEST_AXIS:
        raise MethodError(
            f"the grid {by(grid)} has an axis of {max(grid)}; coordinates are int16, so at most {LONGEST_AXIS}."
        )
    if any(d > g for d, g in zip(dilation, grid, strict=True)) or int(np.prod(dilation)) > LONGEST_AXIS:
        raise MethodError(
            f"dilation {dilation} must not exceed the grid {by(grid)}, nor make over {LONGEST_AXIS} residue classes."
        )


def by(numbers: Sequence[int]) -> str:
    """(3, 5, 8) -> "3x5x8" """
    return "x".join(map(str, numbers))
