"""The plan: which key blocks each query block visits, in which order, and what stands for the rest.

Letters: B batch, H heads, N query tokens, M key tokens, P plan positions, R query blocks, C key blocks, K list width, A mask axes.
Bm is 1 or B and Hm is 1 or H: a leading dimension of 1 is shared, never copied.

* A block is any run of plan positions, on both sides; length 0 is legal. No kernel tile straddles two blocks, so ragged grids
  need no padding.
* A plan is a value: frozen, printable, savable, and checked once when it is made. Kernels accept nothing else.
* Lists hold full entries first (no pair mask), then partial ones, so that the mask-free loop stays mask-free.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foveal.kernels.block_sparse import checks, counting

ListOrder = Literal["address", "priority"]


@dataclass(frozen=True, eq=False)
class Box:
    """Pair mask of partial entries: query q attends key k iff ``low[a, q] <= coord[a, k] < high[a, q]`` on every axis a.

    low, high: [A, Pq] int16; coord: [A, Pk] int16; both in plan positions. A residue class (dilation) is one more axis.
    span: host fact, smallest and largest coordinate of every axis; worked out here unless the maker gives it.
    cell: host fact or None: the keys of every block that is a partial entry lie at the coordinates of its first key plus ``cell[a]``, one
    number for each key of the block, the same for all blocks. Tensor cores can mask then.
    """

    low: Tensor
    high: Tensor
    coord: Tensor
    span: tuple[tuple[int, int], ...] | None = None
    cell: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.span is None and self.coord.ndim == 2 and self.coord.shape[1]:
            ends = torch.stack(torch.aminmax(self.coord, dim=1), dim=1).tolist()
            object.__setattr__(self, "span", tuple((low, high) for low, high in ends))

    def to(self, device: torch.device | str) -> Box:
        return Box(self.low.to(device), self.high.to(device), self.coord.to(device), self.span, self.cell)


@dataclass(frozen=True, eq=False)
class Proxies:
    """One pooled key and value per key block; stands for every block that is not listed and whose bias is not -inf.

    k, v: [B, Hkv, C, D] mean key and mean value; n: [Bm, Hm, C] fp32 number of keys behind the mean (0 removes the proxy).
    k_var: [B, Hkv, C, D] fp32 per-channel key variance or None. A proxy's score is
    ``scale * q.k + ln n + scale^2 / 2 * sum_d(q_d^2 k_var_d)``: the log of the block's mass under a Gaussian of its keys.
    """

    k: Tensor
    v: Tensor
    n: Tensor
    k_var: Tensor | None = None

    def to(self, device: torch.device | str) -> Proxies:
        moved = [None if x is None else x.to(device) for x in (self.k, self.v, self.n, self.k_var)]
        return Proxies(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockPlan:
    """Which key blocks each query block visits. Index tensors are int32.

    n_queries, n_keys   lengths of the caller's q and k
    q_start, q_len      [R], [Bm, R] or [Bm, Hm, R]: query blocks as runs of plan positions; stored as [Bm, Hm, R]
    kv_start, kv_len    the same for C key blocks; ``kv_len`` holds for full entries too
    count, n_full       [Bm, Hm, R] (or [R]): valid list entries; the first ``n_full`` of them need no pair mask
    index               [Bm, Hm, R, K] (or [R, K]): key blocks; inside each part in ``list_order``
    list_order          "address": ascending ("priority" is put down for a plan that is not, unless it is ``trusted``); or "priority"
    q_order, kv_order   [P] or [B, H, P] or None: plan position p holds the caller's token order[p]; -1 is padding
    ordered             True: the caller's tensors are in plan order already, orders are kept for information only
    dense_rows          ranges (first, last) of query blocks that visit every key block; their list entries are ignored
    box, row_bits       pair masks of partial entries; row_bits is int32 [Bm, Hm, Pq, ceil(C / 32)], bit c = sees block c
    block_bias          fp32 [Bm, Hm, C] or [Bm, Hm, R, C], natural log, added to the scaled scores; -inf removes the block
    key_bias            fp32 [Bm, Hm, Pk], natural log, in plan positions; -inf removes the key
    proxies             pooled stand-ins for the blocks that are not listed
    max_q_len, max_kv_len, covers, kv_stride, tiled   host facts, worked out here unless the maker gives them: the longest blocks;
                    whether blocks cover all queries; the spacing of key blocks when block c starts at c * kv_stride (else 0);
                    and whether every key block then fills its spacing, the last one cut by the end of the sequence.
                    Without them a plan made on a device waits once.
    spread              host fact: standard deviation / mean of the lengths of all lists, dense rows included, worked out here unless
                    ``trusted``; None, not known, is taken as large: work is then shared out as it comes, not in advance
    pairs               attended (query, key) pairs of one head after every mask, when the maker knows it
    trusted             True skips the value checks (shapes are always checked): for makers that guarantee them, and that put
                    -inf in key_bias where kv_order is -1

    A query that no block covers, or whose list is empty, yields output 0 and LSE -inf.
    Raises ``PlanError`` (a ValueError) in one sentence that says what is wrong.
    """

    n_queries: int
    n_keys: int
    q_start: Tensor
    q_len: Tensor
    kv_start: Tensor
    kv_len: Tensor
    count: Tensor
    n_full: Tensor
    index: Tensor
    list_order: ListOrder = "address"
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    ordered: bool = False
    dense_rows: tuple[tuple[int, int], ...] = ()
    box: Box | None = None
    row_bits: Tensor | None = None
    block_bias: Tensor | None = None
    key_bias: Tensor | None = None
    proxies: Proxies | None = None
    max_q_len: int = -1
    max_kv_len: int = -1
    covers: bool | None = None
    kv_stride: int = -1
    tiled: bool | None = None
    spread: float | None = None
    pairs: int | None = None
    label: str = ""
    trusted: bool = False
    derived: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    # forms of this plan that an implementation worked out once; never part of its meaning

    def __post_init__(self) -> None:
        for name, value in checks.canonical(self).items():
            object.__setattr__(self, name, value)
        checks.check_shapes(self)
        if not self.trusted:
            checks.check_values(self)
            if self.spread is None:
                object.__setattr__(self, "spread", counting.spread(self))
            if self.list_order == "address" and not checks.ascend(self):
                object.__setattr__(self, "list_order", "priority")
            object.__setattr__(self, "key_bias", checks.without_padding(self))
            object.__setattr__(self, "trusted", True)
        if self.max_q_len < 0:
            object.__setattr__(self, "max_q_len", int(self.q_len.max()) if self.q_len.numel() else 0)
        if self.max_kv_len < 0:
            object.__setattr__(self, "max_kv_len", int(self.kv_len.max()) if self.kv_len.numel() else 0)
        if self.covers is None:
            object.__setattr__(self, "covers", bool((self.q_len.sum(-1) == self.q_positions).all()))
        if self.kv_stride < 0 or self.tiled is None:
            self._measure_spacing()

    def _measure_spacing(self) -> None:
        steps = torch.arange(self.n_kv_blocks, device=self.kv_start.device) * self.max_kv_len
        if self.kv_stride < 0:
            spaced = self.n_kv_blocks > 1 and bool((self.kv_start == steps).all())
            object.__setattr__(self, "kv_stride", self.max_kv_len if spaced else 0)
        if self.tiled is None:
            filled = self.kv_len == (self.kv_positions - steps).clamp(max=self.max_kv_len)
            object.__setattr__(self, "tiled", self.kv_stride > 0 and bool(filled.all()))

    # ---- sizes
    @property
    def n_q_blocks(self) -> int:
        return self.q_start.shape[-1]

    @property
    def n_kv_blocks(self) -> int:
        return self.kv_start.shape[-1]

    @property
    def q_positions(self) -> int:
        """P of the query side: tokens plus padding of the order."""
        return self.n_queries if self.ordered or self.q_order is None else self.q_order.shape[-1]

    @property
    def kv_positions(self) -> int:
        return self.n_keys if self.ordered or self.kv_order is None else self.kv_order.shape[-1]

    @property
    def has_pair_masks(self) -> bool:
        return self.box is not None or self.row_bits is not None

    @property
    def device(self) -> torch.device:
        return self.index.device

    # ---- what it costs
    @property
    def density(self) -> float:
        """Attended pairs after every mask / all pairs, mean over batch and heads."""
        return counting.attended_pairs(self) / max(1, self.n_queries * self.n_keys)

    @property
    def visited(self) -> float:
        """Pairs in executed tiles (128 query rows by 64 keys) / all pairs, mean over batch and heads."""
        return counting.visited_pairs(self) / max(1, self.n_queries * self.n_keys)

    def visits(self) -> Tensor:
        """-> bool [Bm, Hm, R, C]: query block r visits key block c (dense rows included)."""
        return counting.visits(self)

    def mask(self) -> Tensor:
        """-> bool [Bm, Hm, N, M] over the caller's tokens: the pairs attended. Quadratic memory: oracle and pictures only."""
        return counting.token_mask(self)

    # ---- other plans
    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Box, Proxies)):
                moved[field.name] = value.to(device)
        return dataclasses.replace(self, **moved)

    def with_kv_len(self, kv_len: Tensor, max_kv_len: int | None = None, *, same_cells: bool = False) -> BlockPlan:
        """The same plan with other valid key counts, [C], [B, C] or [B, H, C] int32, e.g. a prompt length per sample.

        Never waits for the device. ``max_kv_len`` bounds the new lengths (default: the present bound). ``same_cells``: blocks that are
        partial entries keep their lengths, so that ``box.cell`` still holds.
        """
        bound = self.max_kv_len if max_kv_len is None else max_kv_len
        box = self.box if self.box is None or same_cells else dataclasses.replace(self.box, cell=None)
        return dataclasses.replace(
            self, kv_len=kv_len, max_kv_len=bound, tiled=False, pairs=None, trusted=True, box=box
        )

    def complement(self) -> BlockPlan:
        """The plan that visits exactly the blocks this one does not. Biases stay; proxies go.

        Raises ``PlanError`` when entries are partial: what a pair mask leaves out of a block is no block.
        """
        return counting.complement(self)

    # ---- checks
    def validate(self) -> BlockPlan:
        """Check every value again (waits for the device). Returns itself."""
        checks.check_values(self)
        return self

    def require_keys(self) -> BlockPlan:
        """Raise ``PlanError`` unless every query is covered and has a key. For methods whose rows must see one."""
        checks.require_keys(self)
        return self

    def __str__(self) -> str:
        name = self.label or "plan"
        masks = [n for n, x in (("box", self.box), ("row bits", self.row_bits)) if x is not None]
        extras = [
            n
            for n, x in (("block bias", self.block_bias), ("key bias", self.key_bias), ("proxies", self.proxies))
            if x is not None
        ]
        tail = "".join(f", {x}" for x in masks + extras)
        return (
            f"{name}: {self.n_queries} x {self.n_keys} tokens, {self.n_q_blocks} x {self.n_kv_blocks} blocks, "
            f"density {self.density:.3f}, visited {self.visited:.3f}{', ordered' if self.ordered else ''}{tail}"
        )

    __repr__ = __str__
