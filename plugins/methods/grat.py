"""GRAT: tokens in groups, and every query of a group sees the same few groups. Static and training-free.

Letters: B batch, H heads, N sequence tokens, D head dim, b reach in groups.

* Groups are blocks of the plan, so every visited block is full: no pair mask is ever evaluated (unless ``tile`` differs).
* The paper ran no dense steps; ``preset="quality"`` keeps the first fifth of the steps and the first layer dense.

Source: "Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers" (Ren et al., 2025).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from foveal.kernels.block_sparse import BlockPlan
from foveal.plugins.axes import checked_ints, per_axis
from foveal.plugins.block_map import Rows, box_of, box_rows
from foveal.plugins.groups import BOUNDARIES, PATTERNS, Groups, density_of, settings
from foveal.plugins.layout import Layout
from foveal.plugins.method import Method, suggest
from foveal.plugins.order import Order, by, order_of
from foveal.plugins.site import Grid, MethodError, Site, State
from foveal.plugins.static_plan import StaticPlan, static_plan
from foveal.plugins.tiles import default_group

Ints = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GRAT(Method):
    """Grouped attention. Per-axis knobs take one number or one per axis (T, H, W).

    group      tokens per group; larger means fewer, wider blocks. None: ``default_group(grid)``
    pattern    "B" groups within ``b``; "X" groups that share a coordinate (3-D: three planes); "X-lines"; "dense";
               "auto" is "B", or with ``density`` whatever pattern comes nearest
    b          reach in groups for "B"; more sees further; -1 is the whole axis. None: 1, or what ``density`` allows
    boundary   "clip": border groups see fewer groups; "shift": the range moves inwards and keeps its size
    tile       tokens per query block where it should differ from the group; never changes the result
    group_offset   groups of odd layers start this many tokens earlier, which hides seams between groups
    preset     "paper": no dense steps; "quality": first 20 % of the steps and layer 0 dense (where not given otherwise)
    """

    name: ClassVar[str] = "grat"
    summary: ClassVar[str] = "static groups of tokens that share one key set (surrounding blocks or criss-cross)"

    group: Ints | None = None
    pattern: Literal["B", "X", "X-lines", "dense", "auto"] = "B"
    b: Ints | None = None
    boundary: Literal["clip", "shift"] = "clip"
    tile: Ints | None = None
    group_offset: Ints | None = None
    preset: Literal["paper", "quality"] | None = None

    def __post_init__(self) -> None:
        self.apply_preset({"paper": {}, "quality": {"dense_steps": 0.2, "dense_layers": (0,)}})
        super().__post_init__()
        for name, least, also in (("group", 1, None), ("b", 0, -1), ("tile", 1, None), ("group_offset", 0, None)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked_ints(name, value, least, also))
        for name, known in (("pattern", (*PATTERNS, "auto")), ("boundary", BOUNDARIES)):
            value = getattr(self, name)
            if value not in known:
                raise MethodError(f"{name} is {value!r}{suggest(value, known)}; it is one of {', '.join(known)}.")
        if self.density is not None and self.b is not None:
            raise MethodError(f"b {self.b} and density {self.density} both set the cost; give one of them.")

    def setting(self, grid: tuple[int, ...], n_global: int = 0, layer: int = 0) -> Groups:
        """What the knobs mean on a grid, ``density`` resolved. Raises ``MethodError`` where nothing fits the budget."""
        return _setting(self._knobs(), tuple(grid), n_global, self._offset(layer))

    def order(self, grid: Grid) -> Order | None:
        """Tile order of the grid; None for "dense", and with ``group_offset``, whose order differs between layers."""
        if self.pattern == "dense" or self.group_offset is not None:
            return None
        return _tile_order(self._knobs(), tuple(grid), None)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, state: State) -> BlockPlan | None:
        if self.pattern == "dense":
            return None
        layout = Layout.of(site)
        layout.check_tensors(q, k, v)
        return self.static_plan(layout, q.device, site.layer).with_valid_text(site.valid_text)

    @torch.compiler.disable
    def static_plan(self, layout: Layout, device: torch.device | str = "cpu", layer: int = 0) -> StaticPlan:
        """The plan for a layout, made once and moved to the device once. Compilers step around it."""
        if self.group_offset is not None and layout.ordered:
            raise MethodError(
                "group_offset gives odd layers another token order, so tokens cannot stay permuted between layers."
            )
        return _planned(self._knobs(), layout, self._offset(layer), torch.device(device))

    def _knobs(self) -> tuple:
        return (self.group, self.pattern, self.b, self.boundary, self.tile, self.density)

    def _offset(self, layer: int) -> Ints | None:
        return self.group_offset if layer % 2 else None


@lru_cache(maxsize=256)
def _setting(knobs: tuple, grid: tuple[int, ...], n_global: int, offset: Ints | None) -> Groups:
    group, pattern, b, boundary, _, density = knobs
    groups = per_axis("group", group or default_group(grid), grid, 1)
    shift = per_axis("group_offset", offset or 0, grid, 0)
    if any(s >= g for s, g in zip(shift, groups, strict=True) if s):
        raise MethodError(f"group_offset {by(shift)} must stay below the group {by(groups)} on every axis.")
    reach = per_axis("b", 1 if b is None else b, grid, 0)
    base = Groups(grid, groups, "B" if pattern == "auto" else pattern, reach, boundary, shift)
    if any(g > length for g, length in zip(groups, grid, strict=True)):
        warnings.warn(
            f"group {by(groups)} exceeds the grid {by(grid)} on some axis; that axis has one group.", stacklevel=4
        )
    if density is None or pattern == "dense":
        return base
    allowed = ("B", "X", "X-lines") if pattern == "auto" else (pattern,)
    costs = [(density_of(s.pairs, grid, n_global), s) for s in settings(base, allowed)]
    within = [(cost, s) for cost, s in costs if cost <= density]
    if not within:
        least = min(cost for cost, _ in costs)
        raise MethodError(
            f"density {density} is below the sparsest setting of pattern {pattern} with groups {by(groups)} on the grid {by(grid)} "
            f"and {n_global} global tokens, which is {least:.4f}; give that much, or a smaller group."
        )
    return max(within, key=lambda item: item[0])[1]


def _tile_order(knobs: tuple, grid: tuple[int, ...], offset: Ints | None) -> Order:
    group, tile = knobs[0], knobs[4]
    groups = per_axis("group", group or default_group(grid), grid, 1)
    tiles = groups if tile is None else per_axis("tile", tile, grid, 1)
    return order_of(grid, tiles, shift=per_axis("group_offset", offset or 0, grid, 0))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept: what is made for inference first may be trained through later
def _planned(knobs: tuple, layout: Layout, offset: Ints | None, device: torch.device) -> StaticPlan:
    if device.type != "cpu":
        return _planned(knobs, layout, offset, torch.device("cpu")).to(device)
    layout.check()
    order = _tile_order(knobs, layout.grid, offset)
    groups = _setting(knobs, layout.grid, layout.global_tokens + layout.extra_keys, offset)
    if groups.pattern in ("B", "dense"):
        tables = groups.tables
        rows, box = box_rows(order, tables), box_of(order, tables)
        return static_plan(layout, order, rows, box=box, visual_pairs=groups.pairs, label=str(groups))
    if order.tile == groups.group:
        return static_plan(layout, order, _cross_rows(groups, order), visual_pairs=groups.pairs, label=str(groups))
    keys = order_of(layout.grid, groups.group, shift=groups.shift)
    rows, bits = _tiled_cross_rows(groups, order, keys)
    return static_plan(layout, order, rows, key_order=keys, row_bits=bits, visual_pairs=groups.pairs, label=str(groups))


def _cross_rows(groups: Groups, order: Order) -> Rows:
    """Tiles are groups: every visit is full."""

    def rows(chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        seen = groups.sees(order.tile_axes[chosen], order.tile_axes)
        return seen, seen

    return rows


def _tiled_cross_rows(groups: Groups, order: Order, keys: Order) -> tuple[Rows, Tensor]:
    """Query tiles of any shape against key groups. -> (visits, bool [grid tokens in plan order, key groups])"""
    mine = groups.of_tokens()[order.token.numpy()]
    names, which = np.unique(mine, axis=0, return_inverse=True)
    seen = groups.sees(names, keys.tile_axes)[which.reshape(-1)]
    first = order.start.numpy()

    def rows(chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        some, every = np.logical_or.reduceat(seen, first, axis=0), np.logical_and.reduceat(seen, first, axis=0)
        return some[chosen], every[chosen]

    return rows, torch.from_numpy(seen)
