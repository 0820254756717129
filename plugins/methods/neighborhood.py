"""Neighbourhood attention, generalised: every query sees a box of the grid around it; stride lets neighbours share the box.

Letters: B batch, H heads, N sequence tokens, D head dim, L axis length.

* Exact semantics: windows are pushed inwards at borders, never cut; strides, dilation and causal axes as in the source.
* Where stride and window are whole tiles that divide the grid, every visited block is full and no pair mask is evaluated.
* Given a budget instead of a window, the window is an odd number of tiles with stride = tile: fully block-sparse where tiles divide.

Source: "Generalized Neighborhood Attention" (Hassani et al., 2025).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan
from foveal.plugins.axes import checked_flags, checked_ints, per_axis
from foveal.plugins.block_map import box_of, box_rows
from foveal.plugins.groups import density_of
from foveal.plugins.layout import Layout
from foveal.plugins.method import Method, suggest
from foveal.plugins.order import Order, by, order_of
from foveal.plugins.site import Grid, MethodError, Site, State
from foveal.plugins.static_plan import StaticPlan, static_plan
from foveal.plugins.tiles import auto_tile, default_group
from foveal.plugins.windows import Window, adapt, snap

Ints = int | tuple[int, ...]
BUDGET = 0.25  # density where neither window nor density is given


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Method):
    """Neighbourhood attention. Per-axis knobs take one value or one per axis (T, H, W); axes of length 1 may be left out.

    window     keys per axis, -1 the whole axis; larger sees further. None: the largest within ``density`` (0.25 if not given)
    stride     queries per axis that share a window; larger is faster and coarser
    dilation   step between keys; larger reaches further at the same cost
    causal     True on an axis: no key after the query
    base_grid  the grid the window was chosen for (-1: the present length); other grids scale it
    snap       "cover" or "nearest": move the window to whole tiles and the stride to one tile, so that masks vanish
    tile       tokens per block and axis; never changes the result. "auto": the tile that visits fewest tokens
    block      tokens an automatic tile aims at (half to double); larger means fewer blocks and more masked pairs
    preset     "paper": first 30 % of the steps dense; "quality": first 25 % and layer 0 (where not given otherwise)
    """

    name: ClassVar[str] = "neighborhood"
    summary: ClassVar[str] = "static box-shaped neighbourhood per query, with stride, dilation and causal axes"

    window: Ints | None = None
    stride: Ints = 1
    dilation: Ints = 1
    causal: bool | tuple[bool, ...] = False
    base_grid: Ints | None = None
    snap: Literal["cover", "nearest"] | None = None
    tile: Ints | Literal["auto"] = "auto"
    block: int = 128
    preset: Literal["paper", "quality"] | None = None

    def __post_init__(self) -> None:
        self.apply_preset({"paper": {"dense_steps": 0.3}, "quality": {"dense_steps": 0.25, "dense_layers": (0,)}})
        super().__post_init__()
        for name, least, also in (
            ("window", 1, -1),
            ("stride", 1, None),
            ("dilation", 1, None),
            ("base_grid", 1, -1),
            ("tile", 1, None),
        ):
            value = getattr(self, name)
            if value is not None and value != "auto":
                object.__setattr__(self, name, checked_ints(name, value, least, also))
        object.__setattr__(self, "causal", checked_flags("causal", self.causal))
        if self.snap not in (None, "cover", "nearest"):
            raise MethodError(
                f"snap is {self.snap!r}{suggest(self.snap, ('cover', 'nearest'))}; it is None, 'cover' or 'nearest'."
            )
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 16:
            raise MethodError(f"block is {self.block!r}; a tile aims at 16 tokens or more.")
        if self.window is not None and self.density is not None:
            raise MethodError(f"window {self.window} and density {self.density} both set the cost; give one of them.")
        if self.window is None and (self.stride, self.dilation, self.causal, self.base_grid, self.snap) != (
            1,
            1,
            False,
            None,
            None,
        ):
            raise MethodError("stride, dilation, causal, base_grid and snap shape a given window; give window too.")

    def setting(self, grid: tuple[int, ...], n_global: int = 0) -> Window:
        """What the knobs mean on a grid, ``density`` resolved. Raises ``MethodError`` where they do not fit it."""
        return _window(self._knobs(), tuple(grid), n_global)

    def order(self, grid: Grid) -> Order | None:
        """Tile order of the grid; None where the setting is dense there."""
        knobs = self._knobs()
        return None if _is_dense_image(knobs, grid) else _tile_order(knobs, tuple(grid))

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> BlockPlan | None:
        if _is_dense_image(self._knobs(), site.grid):
            return None
        layout = Layout.of(site)
        layout.check_tensors(q, k, v)
        return self.static_plan(layout, q.device).with_valid_text(site.valid_text)

    @torch.compiler.disable
    def static_plan(self, layout: Layout, device: torch.device | str = "cpu") -> StaticPlan:
        """The plan for a layout, made once and moved to the device once. Compilers step around it."""
        return _planned(self._knobs(), layout, torch.device(device))

    def _knobs(self) -> tuple:
        return (
            self.window,
            self.stride,
            self.dilation,
            self.causal,
            self.base_grid,
            self.snap,
            self.tile,
            self.block,
            self.density,
        )


def _is_dense_image(knobs: tuple, grid: tuple[int, ...]) -> bool:
    """A video configuration with a base grid stays dense on images."""
    base = knobs[4]
    return base is not None and len(grid) == 3 and grid[0] == 1 and (isinstance(base, int) or len(base) == 3)


@lru_cache(maxsize=256)
def _window(knobs: tuple, grid: tuple[int, ...], n_global: int) -> Window:
    window, stride, dilation, causal, base, how, tile, _, density = knobs
    if window is None:
        return _within(_coarse_tile(tile, grid), grid, n_global, BUDGET if density is None else density)
    wide = per_axis("window", window, grid, 1)
    found = Window(
        grid,
        tuple(length if w == -1 else w for w, length in zip(wide, grid, strict=True)),
        per_axis("stride", stride, grid, 1),
        per_axis("dilation", dilation, grid, 1),
        per_axis("causal", causal, grid, False),
    )
    if base is not None:
        found = adapt(found, per_axis("base_grid", base, grid, -1))
    if how is not None:
        found = snap(found, _coarse_tile(tile, grid), how)
    return found.check()


def _coarse_tile(tile: Ints | str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The tile of budgets and snapping: as given, or the grid's default group."""
    return default_group(grid) if tile == "auto" else per_axis("tile", tile, grid, 1)


def _within(tile: tuple[int, ...], grid: tuple[int, ...], n_global: int, density: float) -> Window:
    """The densest block-sparse window within a budget."""
    costs = [(density_of(w.pairs, grid, n_global), w) for w in _block_windows(tile, grid)]
    within = [item for item in costs if item[0] <= density]
    if not within:
        raise MethodError(
            f"density {density} is below the smallest window, one tile of {by(tile)} on the grid {by(grid)} with {n_global} "
            f"global tokens, which is {min(c for c, _ in costs):.4f}; give that much, or a smaller tile."
        )
    return max(within, key=lambda item: item[0])[1]


def _block_windows(tile: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[Window]:
    """Odd numbers of tiles per axis, or the whole axis; on the two last axes nearly equal numbers."""
    options = [[*range(t, length, 2 * t), length] for t, length in zip(tile, grid, strict=True)]
    stride = tuple(min(t, length) for t, length in zip(tile, grid, strict=True))
    for window in itertools.product(*options):
        reach = [w // t for w, t, length in zip(window[-2:], tile[-2:], grid[-2:], strict=True) if w < length]
        if not reach or max(reach) - min(reach) <= 2:
            yield Window(grid, window, tuple(map(min, stride, window)), (1,) * len(grid), (False,) * len(grid))


def _tile_order(knobs: tuple, grid: tuple[int, ...]) -> Order:
    """Depends on the grid alone, never on the text, so that a host may permute tokens once."""
    tile, block = knobs[6], knobs[7]
    if tile != "auto":
        tiles = per_axis("tile", tile, grid, 1)
    elif knobs[0] is None or knobs[5] is not None:
        tiles = default_group(grid)
    else:
        tiles = auto_tile(_window(knobs, grid, 0), block)
    return order_of(grid, tiles, (1,) * len(grid) if knobs[0] is None else _window(knobs, grid, 0).dilation)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: what is made for inference first may be trained through later
def _planned(knobs: tuple, layout: Layout, device: torch.device) -> StaticPlan:
    if device.type != "cpu":
        return _planned(knobs, layout, torch.device("cpu")).to(device)
    layout.check()
    window = _window(knobs, layout.grid, layout.global_tokens + layout.extra_keys)
    order = _tile_order(knobs, layout.grid)
    tables = window.tables
    label = f"neighborhood {window} tile {by(order.tile)}"
    return static_plan(
        layout, order, box_rows(order, tables), box=box_of(order, tables), visual_pairs=window.pairs, label=label
    )
